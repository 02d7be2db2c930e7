"""Simple checks on the log and the measurements of a run, each answered in a sentence."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mfd_fast.report.record import LogLines, RunRecord, column, finite, last_update, numbers, steps_in
from mfd_fast.report.words import State, show

FEWEST_LINES = 20
"""A trend is judged from this many log lines on."""


class Check(NamedTuple):
    """One question about a run and its answer."""

    state: State
    title: str
    sentence: str


def health_checks(record: RunRecord) -> list[Check]:
    """All checks that apply to what the run folder holds."""
    checks = [
        _velocity_gap(record),
        _auxiliary_loss(record),
        _finite_numbers(record),
        _skipped_updates(record),
        _gradient_spikes(record),
        _spread(record),
        _recall(record),
        _copying(record),
    ]
    return [check for check in checks if check is not None]


def sample_spread(record: RunRecord) -> tuple[str, float] | None:
    """Standard deviation over all values of the real samples if the run kept them, else of the teacher's samples."""
    teachers = sorted((stem for stem in record.samples if stem.startswith("teacher-")), key=steps_in, reverse=True)
    for stem, name in [("data", "the real data"), *((stem, "the teacher's samples") for stem in teachers[:1])]:
        if stem in record.samples and math.isfinite(spread := float(record.samples[stem].x.std())):
            return name, spread
    return None


def _smooth(values: NDArray[np.float64], parts: int = 10) -> NDArray[np.float64]:
    usable = values[np.isfinite(values)]
    return np.array([np.median(part) for part in np.array_split(usable, min(parts, len(usable)))])


def _trend(lines: LogLines, key: str) -> NDArray[np.float64] | None:
    _, values = column(lines, key)
    return _smooth(values) if np.isfinite(values).sum() >= FEWEST_LINES else None


def _velocity_gap(record: RunRecord) -> Check | None:
    title = "Velocity gap between teacher and auxiliary"
    if not record.student_log:
        return None
    trend = _trend(record.student_log, "velocity_gap")
    if trend is None:
        return Check("unknown", title, f"Fewer than {FEWEST_LINES} log lines: too early to see a trend.")
    peak, last = float(trend.max()), float(trend[-1])
    if peak == 0:
        return Check("problem", title, "It is zero throughout: the auxiliary does not follow the student.")
    change = f"from {show(peak)} at its highest to {show(last)} at the end"
    if last <= 0.7 * peak:
        return Check("good", title, f"It fell {change}: the student moves towards the teacher.")
    if int(trend.argmax()) == len(trend) - 1:
        return Check("problem", title, f"It is at its highest, {show(last)}, at the end: it still grows.")
    return Check("look", title, f"It hardly fell, {change}: more updates or a smaller learning rate may help.")


def _auxiliary_loss(record: RunRecord) -> Check | None:
    title = "Auxiliary loss"
    if not record.auxiliary_log:
        return None
    trend = _trend(record.auxiliary_log, "loss")
    if trend is None:
        return Check("unknown", title, f"Fewer than {FEWEST_LINES} log lines: too early to see a trend.")
    # Early on the loss may rise for a good reason: the student's samples gain the variety that they lacked.
    late = trend[len(trend) // 2 :]
    lowest, last = float(late.min()), float(late[-1])
    values = f"in the second half of the run it was {show(lowest)} at its lowest and ends at {show(last)}"
    if last <= 1.3 * lowest:
        return Check("good", title, f"Steady: {values}. The auxiliary keeps up with the student.")
    advice = "The auxiliary falls behind the student; give it more updates or slow the student down."
    return Check("look" if last <= 2 * lowest else "problem", title, f"Rising: {values}. {advice}")


def _finite_numbers(record: RunRecord) -> Check | None:
    logs = [*record.teacher_log, *record.auxiliary_log, *record.student_log]
    if not logs:
        return None
    bad = sum(any(key in line and finite(line[key]) is None for key in ("loss", "grad_norm")) for line in logs)
    title = "Finite numbers"
    if bad == 0:
        return Check("good", title, "Every logged loss and gradient norm is finite.")
    return Check(
        "problem", title, f"{bad:,} of {len(logs):,} log lines have a loss or gradient norm that is not finite."
    )


def _skipped_updates(record: RunRecord) -> Check | None:
    lines = [*record.auxiliary_log, *record.student_log]
    counts = [count for line in lines if (count := finite(line.get("skipped"))) is not None]
    if not counts:
        return None
    skipped, total = int(max(counts)), last_update(record.student_log, record.auxiliary_log)
    title = "Skipped updates"
    if skipped == 0:
        return Check("good", title, "No update was skipped.")
    sentence = f"{skipped:,} of {total:,} updates were skipped, because a gradient was not finite."
    return Check("look" if skipped <= 0.01 * total else "problem", title, sentence)


def _gradient_spikes(record: RunRecord) -> Check | None:
    title = "Gradient norms"
    worst = 0.0
    where = ""
    for role, lines in (("auxiliary", record.auxiliary_log), ("student", record.student_log)):
        _, values = column(lines, "grad_norm")
        values = values[np.isfinite(values)]
        if len(values) < FEWEST_LINES or np.median(values) <= 0:
            continue
        ratio = float(values.max() / np.median(values))
        if ratio > worst:
            worst, where = ratio, role
    if not where:
        return None
    sentence = f"The largest norm is {show(worst)} times the usual one (in the {where}'s updates)."
    return Check("good" if worst < 30 else "look", title, sentence)


def _spread(record: RunRecord) -> Check | None:
    reference = sample_spread(record)
    _, logged = column(record.student_log, "sample_std")
    usable = logged[np.isfinite(logged)]
    if reference is None or not len(usable) or reference[1] <= 0:
        return None
    title = "Spread of the student's samples"
    last = float(np.median(usable[-FEWEST_LINES:]))
    ratio = last / reference[1]
    sentence = f"Their standard deviation is {show(last)}; that of {reference[0]} is {show(reference[1])}."
    away = abs(math.log(ratio)) if ratio > 0 else math.inf
    if away <= math.log(1.1):
        return Check("good", title, sentence)
    meaning = "too little variety" if ratio < 1 else "too much contrast or noise"
    return Check("look" if away <= math.log(1.35) else "problem", title, f"{sentence} That is a sign of {meaning}.")


def _recall(record: RunRecord) -> Check | None:
    values = numbers(record.metrics.get("recall"))
    if "teacher" not in values or "student" not in values:
        return None
    sentence = f"Recall is {show(values['student'])} for the student and {show(values['teacher'])} for its teacher."
    if values["student"] >= 0.85 * values["teacher"]:
        return Check("good", "Variety", f"{sentence} The student covers what its teacher covers.")
    state: State = "look" if values["student"] >= 0.5 * values["teacher"] else "problem"
    return Check(state, "Variety", f"{sentence} The student leaves out kinds of data that its teacher can make.")


def _copying(record: RunRecord) -> Check | None:
    values = numbers(record.metrics.get("nearest_neighbour"))
    if "student" not in values or values.get("held_out", 0.0) <= 0:
        return None
    ratio = values["student"] / values["held_out"]
    sentence = f"Student samples are {show(ratio)} times as far from the training data as held-out real data."
    if ratio >= 0.7:
        return Check("good", "Copies of training data", f"{sentence} Nothing points to copying.")
    return Check("look", "Copies of training data", f"{sentence} Some may be copies.")
