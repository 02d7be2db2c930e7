"""``mfd-fast checkpoint evaluate``, ``extract`` and ``prune --keep-best`` on real runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from mfd_fast import load_student
from mfd_fast.run_folder import RunFolder


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, points: list[str]) -> Path:
    """A finished run on points with a checkpoint for each of its three student updates and averaged weights."""
    from mfd_fast.cli import main

    path = tmp_path_factory.mktemp("several") / "run"
    more = ("distill.checkpoint_every=1", "distill.keep_checkpoints=5", "distill.ema_decay=0.5")
    options = [*points, *(part for setting in more for part in ("--set", setting))]
    for command in ("train-teacher", "distill", "evaluate"):
        assert main([command, *((str(path),) if command == "evaluate" else ("--run", str(path), *options))]) == 0
    return path


def test_checkpoints_are_measured_as_the_finished_student_is(several: Path, cli: Any, refused: Any) -> None:
    names = sorted(path.name for path in RunFolder(several).distill_checkpoints().iterdir())
    assert len(names) == 3
    assert "no checkpoint has been measured" in refused("checkpoint", "extract", several, "out")
    result = cli("checkpoint", "evaluate", several)
    assert result.code == 0
    scores = json.loads((RunFolder(several).distill_checkpoints() / "scores.json").read_text())
    assert list(scores) == names
    metrics = json.loads((several / "metrics.json").read_text())
    assert scores[names[-1]]["distance"] == metrics["student"]["1"]
    assert len({entry["distance"] for entry in scores.values()}) == 3
    assert f"{scores[names[0]]['distance']:.4f}" in cli("checkpoint", "list", several).out
    assert cli("checkpoint", "evaluate", several).out == result.out

    best = min(scores, key=lambda name: scores[name]["distance"])
    assert f"student of distill/{best} in out" in cli("checkpoint", "extract", several, "out").out
    assert cli("evaluate", "out").code == 0
    again = json.loads(Path("out/metrics.json").read_text())
    assert again["student"]["1"] == scores[best]["distance"]
    assert "out exists already" in refused("checkpoint", "extract", several, "out")
    assert cli("checkpoint", "extract", several, "last", "--name", f"distill/{names[-1]}").code == 0
    ours, theirs = load_student("last").sample(5), load_student(several).sample(5)
    assert ours.equal(theirs)

    assert "keep_best must be at least 1, got 0" in refused("checkpoint", "prune", several, "--keep-best", "0")
    assert cli("checkpoint", "prune", several, "--keep", "1").code == 0
    left = {path.name for path in RunFolder(several).distill_checkpoints().iterdir() if path.is_dir()}
    assert left == {names[-1], best}


def test_what_cannot_be_measured_is_said(run: Path, cli: Any, refused: Any) -> None:
    (whole,) = (run / "checkpoints" / "distill").iterdir()
    (whole / "state.json").write_text("{}")
    result = cli("checkpoint", "evaluate", run)
    assert result.code == 1
    assert "state.json is damaged" in result.out
    assert "--name must be one of distill/update-" in refused("checkpoint", "extract", run, "out", "--name", "nothing")
    assert "state.json is damaged" in refused("checkpoint", "extract", run, "out", "--name", f"distill/{whole.name}")
    assert not Path("out").exists()
