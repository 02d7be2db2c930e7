import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfd_fast.report.health import Check, health_checks, sample_spread
from mfd_fast.report.record import LogLines, RunRecord, Samples, read_run


@pytest.fixture
def nothing(empty_run: Path) -> RunRecord:
    return read_run(empty_run)


def _lines(key: str, values: list[Any]) -> LogLines:
    return [{"update": i, key: value} for i, value in enumerate(values)]


def _check(record: RunRecord, title: str) -> Check:
    (found,) = [check for check in health_checks(record) if check.title.startswith(title)]
    return found


def test_a_good_run_is_good_throughout(full_run: Path) -> None:
    checks = health_checks(read_run(full_run))
    assert len(checks) == 8
    assert {check.state for check in checks} == {"good"}, checks


def test_nothing_is_said_about_nothing(nothing: RunRecord) -> None:
    assert health_checks(nothing) == []


@pytest.mark.parametrize(
    ("gap", "state", "words"),
    [
        (np.linspace(0.0, 1.0, 50), "problem", "it still grows"),
        (np.linspace(1.0, 0.1, 50), "good", "It fell from 0.963 at its highest to 0.137 at the end"),
        (np.linspace(1.0, 0.6, 50), "good", "It fell"),
        (np.r_[np.linspace(0, 1, 25), np.linspace(1, 0.9, 25)], "look", "It hardly fell"),
        (np.zeros(50), "problem", "zero throughout"),
        (np.ones(5), "unknown", "too early"),
    ],
    ids=["grows", "falls", "falls-a-little", "flat", "zero", "short"],
)
def test_velocity_gap(nothing: RunRecord, gap: np.ndarray, state: str, words: str) -> None:
    record = dataclasses.replace(nothing, student_log=_lines("velocity_gap", gap.tolist()))
    check = _check(record, "Velocity gap")
    assert check.state == state
    assert words in check.sentence


@pytest.mark.parametrize(
    ("last", "state"), [(0.4, "good"), (0.6, "look"), (1.5, "problem")], ids=["steady", "rising", "lost"]
)
def test_auxiliary_loss(nothing: RunRecord, last: float, state: str) -> None:
    losses = [0.1] * 40 + [0.4] * 80 + [last] * 20
    record = dataclasses.replace(nothing, auxiliary_log=_lines("loss", losses))
    assert _check(record, "Auxiliary loss").state == state


def test_losses_that_are_not_finite_are_counted(nothing: RunRecord) -> None:
    record = dataclasses.replace(nothing, student_log=_lines("loss", [0.1, None, float("nan"), 0.2]))
    check = _check(record, "Finite numbers")
    assert check.state == "problem"
    assert check.sentence.startswith("2 of 4 log lines")


@pytest.mark.parametrize(("skipped", "state"), [(0, "good"), (2, "look"), (90, "problem")], ids=["none", "few", "many"])
def test_skipped_updates(nothing: RunRecord, skipped: int, state: str) -> None:
    record = dataclasses.replace(nothing, student_log=_lines("skipped", [0] * 299 + [skipped]))
    assert _check(record, "Skipped").state == state


def test_a_gradient_spike_is_pointed_out(nothing: RunRecord) -> None:
    record = dataclasses.replace(nothing, student_log=_lines("grad_norm", [1.0] * 40 + [200.0]))
    check = _check(record, "Gradient norms")
    assert check.state == "look"
    assert "200 times the usual one (in the student's updates)" in check.sentence


@pytest.mark.parametrize(
    ("std", "state", "words"),
    [(1.02, "good", "1.02"), (0.8, "look", "too little variety"), (3.0, "problem", "too much contrast")],
    ids=["equal", "narrow", "wide"],
)
def test_spread_is_compared_with_the_best_teacher(nothing: RunRecord, std: float, state: str, words: str) -> None:
    points = np.array([[-1.0, 1.0], [1.0, -1.0]], dtype=np.float32)
    samples = {"teacher-1": Samples(points * 9, None), "teacher-100": Samples(points, None)}
    log = _lines("sample_std", [9.0] * 10 + [std] * 30)
    check = _check(dataclasses.replace(nothing, student_log=log, samples=samples), "Spread")
    assert check.state == state
    assert words in check.sentence


def test_spread_prefers_real_data(nothing: RunRecord) -> None:
    points = np.array([[-2.0, 2.0]], dtype=np.float32)
    samples = {"data": Samples(points, None), "teacher-100": Samples(points * 2, None)}
    assert sample_spread(dataclasses.replace(nothing, samples=samples)) == ("the real data", 2.0)


@pytest.mark.parametrize(
    ("metrics", "title", "state"),
    [
        ({"recall": {"teacher": 0.9, "student": 0.6}}, "Variety", "look"),
        ({"recall": {"teacher": 0.9, "student": 0.3}}, "Variety", "problem"),
        ({"nearest_neighbour": {"student": 0.1, "held_out": 2.0}}, "Copies", "look"),
        ({"nearest_neighbour": {"student": 1.9, "held_out": 2.0}}, "Copies", "good"),
    ],
    ids=["less-variety", "little-variety", "copies", "no-copies"],
)
def test_measurements_are_judged(nothing: RunRecord, metrics: dict, title: str, state: str) -> None:
    assert _check(dataclasses.replace(nothing, metrics=metrics), title).state == state
