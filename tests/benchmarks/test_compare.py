"""The arithmetic of the ratio table: medians of ratios, what is refused, what a run that fails leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import figures
from compare import Measured, Record, check, padding_waste, ratio_table, table_lines
from contenders import Choice, DiffraxChoice, Way, euler
from workload import Draw

EXACT = (torch.ones(2, 3), torch.zeros(2, 3))
NONE = torch.zeros(2)
DRAW = Draw(torch.zeros(2, 3), torch.tensor([0.9, 0.5]), torch.tensor([0.1, 0.3]), NONE)


def way(name: str, error: float, same_numbers: bool = False) -> Way:
    return Way(name, lambda draw: (EXACT[0] * (1 + error), EXACT[1]), same_numbers)


def test_wrong_numbers_are_not_timed() -> None:
    good = way("own", 0.0, True)
    check([good, way("same", 1e-5, True), way("near", 0.05)], DRAW)
    with pytest.raises(SystemExit, match="not the same: its gradient differs"):
        check([good, way("not the same", 1e-3, True)], DRAW)
    with pytest.raises(SystemExit, match="far"):
        check([good, way("far", 0.2)], DRAW)


def test_ratios_are_medians_within_draws() -> None:
    own = f"mfd_fast compiled: {euler().words()}"
    measured = {
        own: Measured([1.0, 2.0, 1.0], [0.1] * 3),
        "torchdiffeq Euler 0.02, same numbers": Measured([5.0, 8.0, 30.0], [0.1] * 3),
    }
    best: dict[str, Way | None] = {"mfd_fast": None, "diffrax": None}
    first, *rest = ratio_table(measured, best, {"share": [0.8, 0.95, 0.9]})
    assert first["ratios"] == [5.0, 4.0, 30.0]
    assert first["ratio"] == 5.0
    assert rest[-1]["ratio"] == 0.9
    assert [line["ratio"] for line in rest[:-1]] == [None] * 5


def test_padding_waste() -> None:
    assert padding_waste(DRAW) == pytest.approx(2 * 40 / (40 + 10))


def test_words() -> None:
    assert euler().words() == "euler 0.02, float32"
    ab2 = Choice("ab2", 0.05, torch.bfloat16)
    assert ab2.with_auxiliary(ab2) == "ab2 0.05, bfloat16"
    assert ab2.with_auxiliary(Choice("midpoint", 0.2, torch.bfloat16)) == "ab2 0.05, auxiliary midpoint 0.2, bfloat16"
    two = Choice("rk4", steps=2)
    assert two.with_auxiliary(Choice("rk4", 0.5)) == "rk4 2 steps, auxiliary rk4 0.5, float32"
    assert DiffraxChoice("rows", "Ralston", 0.1).words() == "Ralston rows 0.1"


def test_a_run_that_fails_leaves_what_it_knew(tmp_path: Path) -> None:
    record = Record(tmp_path, "compare")
    record.add(gemm={"bfloat16": 1.0})
    record.add(limit=[2.0])
    unfinished = tmp_path / "compare-unfinished.json"
    assert json.loads(unfinished.read_text("utf-8")) == {"gemm": {"bfloat16": 1.0}, "limit": [2.0]}
    record.finish("the table")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.json", "compare.txt"]
    assert (tmp_path / "compare.txt").read_text("utf-8") == "the table\n"


def test_the_table_shows_what_was_searched() -> None:
    trials = [
        {"choice": "ab2 3 steps, bfloat16", "seconds": [0.1], "error": [0.09]},
        {"choice": "ab2 6 steps, bfloat16", "seconds": [0.2, 0.3], "error": [0.01, 0.03]},
    ]
    results = {
        "gemm": {"mkl_float32": 100.0, "onednn_float32": 200.0, "onednn_over_mkl": 2.0, "bfloat16": 400.0},
        "conditions": {"end": {"processor": "P"}, "draws": 2},
        "padding_waste": [2.5], "allowed_error": [0.05, 0.05], "ways": {}, "table": [], "sequential_mlps": [],
        "searched": {"mfd_fast": {"pairs": 4, "best": None, "tried": {"teacher": trials, "auxiliary": trials[1:]}}},
    }  # fmt: skip
    lines = list(table_lines(results))
    assert lines[-3].startswith("tried by mfd_fast, 4 pairs")
    assert lines[-2] == "  teacher: ab2 3 steps, bfloat16 (100, 0.090*); ab2 6 steps, bfloat16 (250, 0.020)"


def test_figures(tmp_path: Path) -> None:
    measured = {"seconds": [0.1, 0.2], "gradient_error": [0.05, 0.06]}
    case = {"compiled": 0.1, "eager": 0.2, "torchdiffeq": 0.4}
    scaling: dict[str, Any] = {axis: {"1": case, "2": case} for axis in ("rows", "step_size", "width", "depth")}
    results = {
        "ways": {"torchode Euler 0.02": measured},
        "work_precision": [{"who": "diffrax", "way": "Heun rescaled 4 + Heun rescaled 2", **measured}],
        "scaling": {"base": {"rows": 1.0, "step_size": 1.0, "width": 1.0, "depth": 1.0}, **scaling},
    }
    figures.draw_all(results, tmp_path, "test")
    for name in ("test-work-precision.png", "test-scaling.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
