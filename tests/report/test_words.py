import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from mfd_fast.report.record import RunRecord, read_run
from mfd_fast.report.words import facts, metric_rows, show, show_seconds, steps_of, verdict


@pytest.fixture(scope="module")
def record(full_run: Path) -> RunRecord:
    return read_run(full_run)


def _measured(record: RunRecord, **metrics: Any) -> RunRecord:
    return dataclasses.replace(record, metrics=metrics)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.1, "2.10"),
        (375.2, "375"),
        (1234.4, "1,234"),
        (0.01234, "0.0123"),
        (0.0000123, "1.23e-05"),
        (0, "0"),
        (-0.5, "-0.500"),
        (math.nan, "not finite"),
        (None, ""),
        ("x", ""),
    ],
    ids=str,
)
def test_numbers_have_three_digits(value: object, text: str) -> None:
    assert show(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.12, "4.1 s"), (95.4, "95 s"), (340, "5 min 40 s"), (7500, "2 h 5 min")], ids=str
)
def test_durations(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text


def test_steps_are_sorted_as_numbers() -> None:
    assert list(steps_of({"100": 1.0, "2": 3.0, "10": 2.0, "best": 0.0, "5": None})) == [2, 10, 100]


def test_the_verdict_of_a_match(record: RunRecord) -> None:
    outcome = verdict(record)
    assert outcome.state == "good"
    assert outcome.sentence == (
        "The one-step student reaches a Fréchet distance of 1.93; its teacher needs 100 steps for 2.10 "
        "(and has 375 at one step)."
    )
    assert "halves of the real data are 0.850 apart, which is chance alone; the student" in outcome.detail
    assert "has 2.27 times that." in outcome.detail


@pytest.mark.parametrize(
    ("student", "state", "words"),
    [
        ({"1": 2.52}, "good", "needs 100 steps for 2.10"),
        ({"1": 2.53}, "look", "2.53, 1.20 times the 2.10 that its teacher has at 100 steps"),
        ({"4": 6.3}, "problem", "The four-step student reaches a Fréchet distance of 6.30, 3.00 times"),
        ({"1": math.nan}, "problem", "not finite: it has diverged"),
    ],
    ids=["within-1.2", "above-1.2", "far", "diverged"],
)
def test_the_verdict_follows_the_ratio(record: RunRecord, student: dict, state: str, words: str) -> None:
    outcome = verdict(_measured(record, teacher={"100": 2.1}, student=student))
    assert outcome.state == state
    assert words in outcome.sentence


def test_the_verdict_without_a_teacher_says_so(record: RunRecord) -> None:
    outcome = verdict(_measured(record, student={"1": 2.0}))
    assert outcome.state == "unknown"
    assert outcome.sentence.endswith("of 2.00; its teacher was not measured.")


def test_the_verdict_names_another_distance(record: RunRecord) -> None:
    outcome = verdict(_measured(record, distance="sliced Wasserstein distance", teacher={"1": 1.0}, student={"1": 1.0}))
    assert outcome.sentence == (
        "The one-step student reaches a sliced Wasserstein distance of 1.00; its teacher needs one step for 1.00."
    )


def test_the_verdict_before_an_evaluation_tells_how_far_the_run_got(record: RunRecord) -> None:
    trained = dataclasses.replace(record, metrics={})
    assert (
        verdict(trained).sentence
        == "This run has not been evaluated yet; its log ends at update 120 of the distillation."
    )
    assert verdict(trained).detail == f"To measure it: mfd-fast evaluate {record.place}"
    own = dataclasses.replace(trained, student={"network": {"factory": "mine:make"}}, place="my runs/one")
    assert verdict(own).detail == "To measure it: mfd-fast evaluate 'my runs/one' --trust-code"
    stopped = dataclasses.replace(trained, student={})
    assert "mfd-fast evaluate" not in verdict(stopped).detail
    assert verdict(stopped).detail.endswith("goes on with --resume.")
    teacher_only = dataclasses.replace(trained, student_log=[], auxiliary_log=[])
    assert verdict(teacher_only).sentence.startswith("Only the teacher has been trained")
    nothing = dataclasses.replace(teacher_only, teacher_log=[], teacher={})
    assert verdict(nothing).sentence == "Nothing has been recorded in this run folder yet."


def test_the_table_has_every_measurement_and_an_explanation(record: RunRecord) -> None:
    rows = {row.name: row for row in metric_rows(record)}
    assert rows["Fréchet distance, 1 step"][1:3] == ("375", "1.93")
    assert rows["Fréchet distance, 100 steps"][1:4] == ("2.10", "", "")
    assert rows["Fréchet distance, real against real"].real_data == "0.850"
    assert rows["Fréchet distance, held-out data"][1:3] == ("3.40", "3.30")
    assert rows["Precision"][1:3] == ("0.910", "0.930")
    assert rows["Recall"].student == "0.840"
    assert rows["Class agreement"].student == "0.991"
    assert rows["Nearest neighbour distance"][1:4] == ("", "2.31", "2.42")
    assert all(row.explanation for row in rows.values())


def test_unknown_measurements_are_shown_and_empty_ones_are_not(record: RunRecord) -> None:
    rows = metric_rows(_measured(record, sliced_wasserstein={"student": 0.5}, precision={"student": None}))
    assert [(row.name, row.student) for row in rows] == [("Sliced wasserstein", "0.500")]


def test_facts(record: RunRecord) -> None:
    known = dict(facts(record))
    assert known["One sample"] == "1 x 8 x 8"
    assert known["Student"] == "mlp"
    assert known["Classes"] == "10"
    assert known["Teacher updates"] == "59"
    assert known["Distillation updates"] == "120"
    assert known["CPU time"] == "7 min 40 s"
    assert known["Seed"] == "0"


def test_a_network_of_the_users_is_named_by_its_factory(record: RunRecord) -> None:
    known = dict(facts(dataclasses.replace(record, student={"network": {"factory": "mine:build"}, "steps": 1})))
    assert known["Student"] == "mine:build"
