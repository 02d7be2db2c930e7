"""``reproduce``: files of a finished experiment, cells that are kept, wrong input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mfd_fast.experiments.low_pass import LOW_PASS


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(LOW_PASS, quick=replace(LOW_PASS.quick, frequencies=4, steps=100))
    monkeypatch.setattr("mfd_fast.experiments.low_pass.LOW_PASS", small)


def test_files_of_an_experiment(cli: Any) -> None:
    result = cli("reproduce", "low-pass", "--quick", "--seeds", "2")
    assert result.code == 0, result.err
    folder = Path("experiments/low-pass-quick")
    kept = json.loads((folder / "result.json").read_text())
    assert kept["quick"] is True
    assert kept["settings"]["frequencies"] == 4
    assert [len(found) for found in kept["cells"].values()] == [2, 2, 2]
    assert (folder / "finding.txt").read_text().strip() == kept["finding"]
    assert kept["finding"] in result.out
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_finished_cells_are_kept_and_others_computed(cli: Any) -> None:
    assert cli("reproduce", "low-pass", "--quick", "--out", "out").code == 0
    cell, other = Path("out/seed-0/constant.json"), Path("out/seed-0/euler.json")
    marked = json.loads(cell.read_text())
    marked["result"]["measured"][0] = 0.123
    cell.write_text(json.dumps(marked))
    other.unlink()
    assert cli("reproduce", "low-pass", "--quick", "--out", "out").code == 0
    cells = json.loads(Path("out/result.json").read_text())["cells"]
    assert cells["constant"][0]["measured"][0] == 0.123
    assert cells["euler"][0]["measured"] == pytest.approx(cells["euler"][0]["expected"], abs=1e-9)


def test_ctrl_c_keeps_what_is_finished(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mfd_fast.experiments import low_pass

    def stopped(settings: Any, cell: str, work: Any) -> Any:
        if cell == "gaussian":
            raise KeyboardInterrupt
        return LOW_PASS.run(settings, cell, work)

    with monkeypatch.context() as patch:
        patch.setattr("mfd_fast.experiments.low_pass.LOW_PASS", replace(low_pass.LOW_PASS, run=stopped))
        assert cli("reproduce", "low-pass", "--quick", "--out", "out").code == 130
    assert sorted(path.name for path in Path("out").rglob("*.*")) == ["constant.json"]
    assert cli("reproduce", "low-pass", "--quick", "--out", "out").code == 0


def test_wrong_input(cli: Any, refused: Any) -> None:
    assert "did you mean 'low-pass'?" in refused("reproduce", "lowpass")
    assert "--seeds must be at least 1, got 0" in refused("reproduce", "low-pass", "--seeds", "0")
    assert cli("reproduce", "low-pass", "--quick", "--out", "out").code == 0
    assert "give another folder with --out" in refused("reproduce", "low-pass", "--out", "out")
