"""The search at equal error: pairs of separate integrations, the fastest that is good enough in every draw."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import search as module
from contenders import Half, Own, euler
from fields import Pair
from mfd_fast.models import build_model
from search import DIFFRAX_GRID, OWN_GRID, front, search
from workload import Draw, gradient_error, make_draw

EXACT = (torch.ones(2, 3), torch.zeros(2, 3))
DRAWS = [Draw(*(torch.full((2,), float(draw)) for _ in range(4))) for draw in range(2)]
ERRORS = {"rough": (0.2, 0.2), "rough later": (0.01, 0.3), "good": (0.04, 0.04), "better": (0.01, 0.01)}
SECONDS = {"rough": 1.0, "rough later": 1.0, "good": 2.0, "better": 3.0}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was run, in order; the clock gives each choice its seconds."""
    made: list[tuple[str, str]] = []

    def cpu_seconds(call: Callable[[], object]) -> float:
        call()
        return SECONDS[made[-1][1]]

    monkeypatch.setattr(module, "cpu_seconds", cpu_seconds)
    return made


def half_of(calls: list[tuple[str, str]]) -> Callable[[str, str], Half]:
    def half(role: str, choice: str) -> Half:
        def run(draw: Draw) -> Tensor:
            calls.append((role, choice))
            sign = 1.0 if role == "teacher" else -1.0
            exact = EXACT[0] if role == "teacher" else EXACT[1]
            return exact + sign * ERRORS[choice][int(draw.t[0])] * EXACT[0]

        return Half(choice, run)

    return half


def test_the_fastest_pair_within_the_error_in_every_draw(calls: list[tuple[str, str]]) -> None:
    grid = {"teacher": ("rough", "rough later", "good", "better"), "auxiliary": ("good", "better")}
    found = search(half_of(calls), grid, DRAWS, [EXACT, EXACT], [0.07, 0.06])
    assert found.best is not None
    assert (found.best.teacher.name, found.best.auxiliary.name) == ("good", "better")
    assert found.best.errors == pytest.approx([0.05, 0.05], rel=1e-5)
    assert found.best.seconds == [5.0, 5.0]
    assert calls.count(("teacher", "rough")) == 2, "once to compile, and given up after the first draw"
    assert len(calls) == 2 + 5 * 3
    record = found.record()
    assert (record["pairs"], record["best"]) == (8, ["good", "better"])
    assert [len(trial["error"]) for trial in record["tried"]["teacher"]] == [1, 2, 2, 2]
    assert search(half_of(calls), grid, DRAWS, [EXACT, EXACT], [0.01, 0.01]).best is None


def test_the_front_is_what_nothing_faster_beats(calls: list[tuple[str, str]]) -> None:
    grid = {"teacher": ("good", "better"), "auxiliary": ("good", "better")}
    found = search(half_of(calls), grid, DRAWS, [EXACT, EXACT], [1.0, 1.0])
    pairs = [(pair.teacher.name, pair.auxiliary.name) for pair in front(found.pairings)]
    assert pairs in (
        [("good", "good"), ("good", "better"), ("better", "better")],
        [("good", "good"), ("better", "good"), ("better", "better")],
    )


def test_a_solver_that_diverges_is_no_reason_to_stop(
    calls: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ERRORS, "rough", (float("nan"), float("inf")))
    found = search(half_of(calls), {"teacher": ("rough",), "auxiliary": ("good",)}, DRAWS, [EXACT, EXACT], [1.0, 1.0])
    assert found.best is None
    assert found.record()["tried"]["teacher"][0]["error"] == [module.DIVERGED]


def test_halves_of_this_package_are_the_pair() -> None:
    torch.manual_seed(0)
    networks = [build_model("mlp", (1, 8, 8), 10, width=16, depth=1).requires_grad_(False) for _ in range(2)]
    for network in networks:
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    own, draw = Own(Pair(networks[0], networks[1], {})), make_draw(0, rows=3)
    apart = tuple(own.half(role, euler(0.2)).run(draw) for role in ("teacher", "auxiliary"))
    assert gradient_error(apart, own.way(euler(0.2)).run(draw)) < 1e-4
    assert gradient_error(apart, own.way(euler(0.1)).run(draw)) > 1e-3


def test_every_choice_of_the_grids_can_be_named() -> None:
    for grid in (OWN_GRID, DIFFRAX_GRID):
        for choices in grid.values():
            words = [choice.words() for choice in choices]
            assert len(set(words)) == len(words)
    assert all(choice.step_size is not None for choice in OWN_GRID["auxiliary"]), "what a pair can be asked for"
