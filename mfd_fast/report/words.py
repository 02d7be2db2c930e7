"""The numbers of a run in plain words: its verdict, its facts and its table of metrics."""

import math
import shlex
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from mfd_fast.report.record import RunRecord, finite, last_update, number, numbers

State = Literal["good", "look", "problem", "unknown"]

MATCHES_TEACHER = 1.2
"""A student matches its teacher up to this ratio of their distances to the data."""
FAR_FROM_TEACHER = 3.0
"""From this ratio on a student is far from its teacher."""

_COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class Verdict(NamedTuple):
    """The outcome of a run in one sentence, and a second one that puts it into perspective."""

    state: State
    sentence: str
    detail: str


class MetricRow(NamedTuple):
    """One line of the table of metrics; a cell without a value is empty."""

    name: str
    teacher: str
    student: str
    real_data: str
    explanation: str


def show(value: object) -> str:
    """A number with three significant digits: ``2.10``, ``375``, ``1,234``, ``1.20e-05``; '' for anything else."""
    given = number(value)
    if given is None:
        return ""
    if not math.isfinite(given):
        return "not finite"
    if given == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(given)))
    if digits > 5:
        return f"{given:.2e}"
    return f"{given:,.{max(0, digits)}f}"


def show_seconds(seconds: float) -> str:
    """A duration for people: ``4.1 s``, ``95 s``, ``5 min 40 s``, ``2 h 5 min``."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def steps_of(distances: object) -> dict[int, float]:
    """Steps -> distance for the entries of ``{"1": 375.0, ...}`` that are finite, in rising order."""
    pairs = {int(key): value for key, value in numbers(distances).items() if key.isdecimal()}
    return dict(sorted(pairs.items()))


def distance_name(metrics: Mapping[str, Any]) -> str:
    """What the distances in metrics.json are: its entry ``distance``, else the Fréchet distance."""
    name = metrics.get("distance")
    return name if isinstance(name, str) and name else "Fréchet distance"


def next_step(record: RunRecord) -> str:
    """The command that shows how good a finished student is."""
    place = shlex.quote(record.place)
    if record.is_pictured:
        return f"mfd-fast sample {place} --images pictures"
    return f"mfd-fast evaluate {place}" + (" --trust-code" if "factory" in record.student_network else "")


def verdict(record: RunRecord) -> Verdict:
    """How the run ended, from what was measured; without measurements, how far it got."""
    measured = record.metrics.get("student")
    student = steps_of(measured)
    if student:
        return _verdict_of_student(record, *next(iter(student.items())))
    if isinstance(measured, Mapping) and any(number(value) is not None for value in measured.values()):
        return Verdict("problem", "The student's distance to the data is not finite: it has diverged.", "")
    if record.student_log:
        updates = last_update(record.student_log, record.auxiliary_log)
        sentence = f"This run has not been evaluated yet; its log ends at update {updates:,} of the distillation."
        if not record.student:
            return Verdict("unknown", sentence, "It is not finished: the command that began it goes on with --resume.")
        detail = f"To {'look at' if record.is_pictured else 'measure'} it: {next_step(record)}"
        return Verdict("unknown", sentence, detail)
    if record.teacher_log or record.teacher:
        return Verdict("unknown", "Only the teacher has been trained so far; there is no student yet.", "")
    return Verdict("unknown", "Nothing has been recorded in this run folder yet.", "")


def _verdict_of_student(record: RunRecord, steps: int, distance: float) -> Verdict:
    name = distance_name(record.metrics)
    teacher = steps_of(record.metrics.get("teacher"))
    begin = f"The {_count(steps)}-step student reaches a {name} of {show(distance)}"
    detail = _perspective(record, distance)
    if not teacher:
        return Verdict("unknown", f"{begin}; its teacher was not measured.", detail)
    most = max(teacher)
    at_start = f" (and has {show(teacher[1])} at one step)" if most != 1 and 1 in teacher else ""
    needs = f"needs {most} steps" if most != 1 else "needs one step"
    ratio = distance / teacher[most] if teacher[most] > 0 else math.inf
    if ratio <= MATCHES_TEACHER:
        return Verdict("good", f"{begin}; its teacher {needs} for {show(teacher[most])}{at_start}.", detail)
    times = f"{show(ratio)} times the {show(teacher[most])}" if math.isfinite(ratio) else f"against the {show(0.0)}"
    where = f"that its teacher has at {most} step{'s' if most != 1 else ''}{at_start}"
    if ratio < FAR_FROM_TEACHER:
        return Verdict("look", f"{begin}, {times} {where}: close, but not yet a match.", detail)
    return Verdict("problem", f"{begin}, {times} {where}: it is still far from its teacher.", detail)


def _perspective(record: RunRecord, distance: float) -> str:
    floor = finite(record.metrics.get("data_half_half"))
    if floor is None or floor <= 0:
        return "Lower is better."
    return (
        f"Lower is better. Two random halves of the real data are {show(floor)} apart, which is chance alone; the "
        f"student has {show(distance / floor)} times that. (Halves are smaller sets, which raises their distance: a "
        "good model can be below it.)"
    )


def _count(steps: int) -> str:
    return _COUNTS[steps] if steps < len(_COUNTS) else str(steps)


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Short name and value pairs for the top of the page; only those that are known."""
    teacher, student = record.teacher, record.student_network
    shape = record.student.get("sample_shape") or teacher.get("sample_shape")
    classes = student.get("num_classes") or teacher.get("num_classes")
    distilled, taught = last_update(record.student_log, record.auxiliary_log), last_update(record.teacher_log)
    wall, cpu = numbers(record.metrics.get("seconds")), numbers(record.metrics.get("cpu_seconds"))
    seed = finite(record.metrics.get("seed"))
    candidates = [
        ("Teacher", _network_name(teacher)),
        ("Student", _network_name(student)),
        ("One sample", " x ".join(str(size) for size in shape) if isinstance(shape, list) else None),
        ("Classes", classes),
        ("Teacher updates", f"{taught:,}" if taught else None),
        ("Distillation updates", f"{distilled:,}" if distilled else None),
        ("Wall time", show_seconds(sum(wall.values())) if wall else None),
        ("CPU time", show_seconds(sum(cpu.values())) if cpu else None),
        ("Seed", None if seed is None else f"{seed:.0f}"),
    ]
    return [(name, str(value)) for name, value in candidates if value is not None]


def _network_name(description: Mapping[str, Any]) -> object:
    return next((description[key] for key in ("model", "factory", "class") if key in description), None)


_SHARES = (
    (
        "precision",
        "Precision",
        "Share of the generated samples that lie close to real ones: how good single samples are. Higher is better.",
    ),
    (
        "recall",
        "Recall",
        "Share of the real samples that lie close to generated ones: a low value means that some kinds of data are "
        "missing. Higher is better.",
    ),
    (
        "class_agreement",
        "Class agreement",
        "Share of the samples that a classifier trained on real data recognises as the class that was asked for. "
        "Higher is better.",
    ),
)


def metric_rows(record: RunRecord) -> list[MetricRow]:
    """The table of metrics, with an explanation of each; measurements this page does not know come last."""
    metrics, name = record.metrics, distance_name(record.metrics)
    name = name[0].upper() + name[1:]
    teacher, student = steps_of(metrics.get("teacher")), steps_of(metrics.get("student"))
    rows = []
    for steps in sorted({*teacher, *student}):
        plural = "s" if steps != 1 else ""
        explanation = f"Distance to the real data when a sample takes {steps} network step{plural}. Lower is better."
        cells = show(teacher.get(steps)), show(student.get(steps))
        rows.append(MetricRow(f"{name}, {steps} step{plural}", *cells, "", explanation))
    if finite(metrics.get("data_half_half")) is not None:
        explanation = (
            "Between two random halves of the real data, to show how large chance is. Halves are smaller sets than "
            "those of the other rows, which alone raises a distance: a good model can be below it."
        )
        rows.append(MetricRow(f"{name}, real against real", "", "", show(metrics["data_half_half"]), explanation))
    held_out = (
        "Distance to real data that no network has seen. If it is far above the distance to the training data, the "
        "model memorises; a held-out set is small, which alone raises it a little."
    )
    rows.append(_by_role(metrics, "held_out", f"{name}, held-out data", held_out))
    rows.extend(_by_role(metrics, key, title, explanation) for key, title, explanation in _SHARES)
    nearest = numbers(metrics.get("nearest_neighbour"))
    explanation = (
        "Median distance from a sample to the closest training example. Near the value of held-out real data is right; "
        "far below it would mean copying."
    )
    near = [show(nearest.get(role)) for role in ("teacher", "student", "held_out")]
    rows.append(MetricRow("Nearest neighbour distance", near[0], near[1], near[2], explanation))
    rows.extend(_other_rows(metrics))
    return [row for row in rows if row.teacher or row.student or row.real_data]


def _by_role(metrics: Mapping[str, Any], key: str, title: str, explanation: str) -> MetricRow:
    values = numbers(metrics.get(key))
    real = values.get("data", values.get("held_out"))
    return MetricRow(title, show(values.get("teacher")), show(values.get("student")), show(real), explanation)


def _other_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    known = {"teacher", "student", "held_out", "nearest_neighbour", "seconds", "cpu_seconds"}
    known.update(key for key, _, _ in _SHARES)
    others = [key for key, value in metrics.items() if key not in known and isinstance(value, Mapping)]
    return [_by_role(metrics, key, key.replace("_", " ").capitalize(), "") for key in others]
