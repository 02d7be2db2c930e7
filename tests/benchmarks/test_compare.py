"""The arithmetic of the ratio table: who is fastest at equal error, medians of ratios, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

import compare
import figures
from compare import Measured, check, fastest, padding_waste, ratio_table
from contenders import Choice, Way, euler
from workload import Draw

EXACT = (torch.ones(2, 3), torch.zeros(2, 3))
NONE = torch.zeros(2)
DRAW = Draw(torch.zeros(2, 3), torch.tensor([0.9, 0.5]), torch.tensor([0.1, 0.3]), NONE)


def way(name: str, error: float, same_numbers: bool = False) -> Way:
    return Way(name, lambda draw: (EXACT[0] * (1 + error), EXACT[1]), same_numbers)


def test_fastest_is_within_the_error_in_every_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"quick and wrong": 1.0, "right once": 1.5, "right": 2.0, "right and slow": 3.0}
    ways = [way("right and slow", 0.01), way("quick and wrong", 0.2), way("right", 0.05)]
    ways.append(way("right once", 0.08))
    monkeypatch.setattr(compare, "_timed", lambda run, draw: (seconds[names[run]], run(draw)))
    names = {each.run: each.name for each in ways}
    kept: dict[str, Measured] = {}
    best = fastest(ways, [DRAW, DRAW], [EXACT, EXACT], [0.1, 0.06], kept)
    assert best is not None
    assert best.name == "right"
    assert kept["quick and wrong"].errors == pytest.approx([0.2, 0.2])
    assert fastest(ways[1:2], [DRAW], [EXACT], [0.1], kept) is None


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
    assert Choice("ab2", 0.05, "midpoint", 0.2, torch.bfloat16).words() == "ab2 0.05, auxiliary midpoint 0.2, bfloat16"
    assert Choice("rk4", 0.0, "rk4", 0.5, steps=2).words() == "rk4 2 steps, auxiliary rk4 0.5, float32"


def test_figures(tmp_path: Path) -> None:
    measured = {"seconds": [0.1, 0.2], "gradient_error": [0.05, 0.06]}
    case = {"compiled": 0.1, "eager": 0.2, "torchdiffeq": 0.4}
    scaling: dict[str, Any] = {axis: {"1": case, "2": case} for axis in ("rows", "step_size", "width", "depth")}
    results = {
        "ways": {"torchode Euler 0.02": measured},
        "tried_at_equal_error": {"mfd_fast compiled: ab2 0.05": measured, "diffrax Heun, rescaled 4": measured},
        "scaling": {"base": {"rows": 1.0, "step_size": 1.0, "width": 1.0, "depth": 1.0}, **scaling},
    }
    figures.draw_all(results, tmp_path, "test")
    for name in ("test-work-precision.png", "test-scaling.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
