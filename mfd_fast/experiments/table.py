"""The table: every method and the teacher, on the same fields, trainer and measure.

Cells: ``teacher`` (trains it, samples it with several numbers of steps); ``METHOD`` for as many student updates as
everybody; ``METHOD-time`` for as many student updates as fit the CPU seconds that the first method took. A method whose
training gives up has its error in the place of numbers. Peak memory is that of the experiment ``cost``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mfd_fast.config import Settings
from mfd_fast.data import load_dataset
from mfd_fast.data.dataset import Dataset
from mfd_fast.distillation import distill
from mfd_fast.experiments.base import Experiment, Result, Results, Work, spread_words
from mfd_fast.experiments.cost import MIB, peak_bytes
from mfd_fast.experiments.drawing import logarithmic
from mfd_fast.experiments.points import trained_teacher
from mfd_fast.finished import load_student
from mfd_fast.methods import METHODS
from mfd_fast.metrics.digits_features import DigitsClassifier, train_digits_classifier
from mfd_fast.metrics.evaluate import sample_report
from mfd_fast.phases import Phases
from mfd_fast.report.theme import Theme, new_figure
from mfd_fast.run_folder import RunFolder
from mfd_fast.settings_io import load_settings
from mfd_fast.student import Student
from mfd_fast.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEACHER_STEPS = (1, 2, 4, 10, 100)
REFERENCE = str(max(TEACHER_STEPS))
"""The steps of the teacher that others are compared with."""
TIMED = "-time"
DIGITS = {
    "vsd": ["distill.method_options.weight=const"],
    "dmd2": ["distill.method_options.gan_weight=0.03"],
    "senseflow": ["distill.method_options.isg_weight=0.05"],
    "cd": ["distill.method_options.bins_end=40", "distill.student_optimizer.learning_rate=5e-4"],
    "ayf": ["distill.student_optimizer.learning_rate=2.5e-4"],
    "meanflow": ["distill.student_optimizer.learning_rate=1e-3"],
    "imm": ["distill.method_options.particles=16"],
}
"""What a few trials of each rival found on the digits, with another seed than those of the table (docs/experiments.md).
The preset's own values were chosen for Mean Flow Distillation."""
POINTS = DIGITS | {
    "cd": ["distill.method_options.bins_end=40", "distill.student_optimizer.learning_rate=2.5e-4"],
    "ayf": ["distill.student_optimizer.learning_rate=1.25e-4"],
    "meanflow": ["distill.student_optimizer.learning_rate=5e-4"],
}
"""The same for the points, where everybody's learning rate is half of that: taken over, not tried."""
COSTS = ("cpu_seconds", "student_updates", "peak_bytes")
MEASURES = ("distance", "precision", "recall", "class_agreement")


@dataclass(frozen=True)
class TableSettings:
    """Budgets of the table."""

    preset: str = "demo"
    student_updates: int | None = None
    """Of every method; None is what the preset says."""
    methods: tuple[str, ...] = tuple(METHODS)
    """The first one sets the time."""
    most: float = 20.0
    """A cheap method gets at most so many times the updates."""
    texts: tuple[str, ...] = ()
    """More settings, ``key=value``."""
    own: dict[str, list[str]] = field(default_factory=dict)
    """By method more settings for it alone, ``key=value``."""
    timed: tuple[str, ...] | None = None
    """Methods with a cell at equal time; None is all but the first."""
    timed_seeds: int | None = None
    """Seeds with those cells, the first ones; None is all."""


def cells(settings: TableSettings) -> tuple[str, ...]:
    """The teacher, all methods, and some again in the time of the first."""
    timed = settings.methods[1:] if settings.timed is None else settings.timed
    return ("teacher", *settings.methods, *(f"{name}{TIMED}" for name in timed))


def settings_of(settings: TableSettings, method: str, updates: int | None, seed: int) -> Settings:
    """The settings of one run."""
    texts = [f"distill.method={method}", f"run.seed={seed}", "run.device=cpu", "run.tensorboard=false"]
    texts += ["distill.sample_every=0", "distill.checkpoint_every=0"]
    texts += [] if updates is None else [f"distill.student_updates={updates}"]
    return load_settings(settings.preset, None, [*settings.texts, *texts, *settings.own.get(method, ())])


def run(settings: TableSettings, cell: str, work: Work) -> Result:
    """See the module."""
    method = cell.removesuffix(TIMED)
    updates = settings.student_updates
    if cell == "teacher":
        return _teacher(settings_of(settings, settings.methods[0], updates, work.seed), work)
    if cell.endswith(TIMED):
        if settings.timed_seeds is not None and work.seed >= settings.timed_seeds:
            return {"left_out": f"equal time is computed for the first {settings.timed_seeds} of the seeds"}
        updates = updates_in_time(work.done[settings.methods[0]], work.done[method], settings.most)
        if updates is None:
            return {"error": f"{method} or {settings.methods[0]} has no time to compare"}
    return _student(settings_of(settings, method, updates, work.seed), cell, work)


def updates_in_time(first: Result, own: Result, most: float) -> int | None:
    """The updates of a method for which it takes the CPU seconds of the first one; None where one of them failed."""
    if "error" in first or "error" in own:
        return None
    times: float = min(most, first["cpu_seconds"] / max(own["cpu_seconds"], 1e-3))
    updates: int = own["student_updates"]
    return max(1, round(updates * times))


def _teacher(chosen: Settings, work: Work) -> Result:
    dataset, clock = _data(chosen), Phases()
    with clock.phase("train"):
        teacher = trained_teacher(chosen, work.folder / "teacher-run", dataset)
    task = Task.from_dataset(dataset, teacher)
    found: Result = {"cpu_seconds": clock.cpu_seconds["train"], "steps": {}}
    for steps in TEACHER_STEPS:
        sampler = Student(
            teacher, task.sample_shape, steps, label_counts=task.label_counts, value_range=task.value_range
        )
        found["steps"][str(steps)] = measure(sampler, dataset, work.seed)
    return found


def _student(chosen: Settings, cell: str, work: Work) -> Result:
    dataset, clock = _data(chosen), Phases()
    teacher = trained_teacher(chosen, work.folder / "teacher-run", dataset)
    folder: Path = work.folder / f"{cell}-run"
    # Begun anew where it was stopped: its time is part of the result.
    run = RunFolder(folder / str(sum(1 for _ in folder.glob("*"))))
    try:
        with clock.phase("distill"):
            distill(teacher, chosen, dataset, run.path)
        found = measure(load_student(run.path), dataset, work.seed)
    except (FloatingPointError, ValueError) as error:
        return {"error": str(error)}
    seconds = {"seconds": clock.seconds["distill"], "cpu_seconds": clock.cpu_seconds["distill"]}
    memory = {} if cell.endswith(TIMED) else {"peak_bytes": peak_bytes(chosen, dataset)}
    return {"student_updates": chosen.distill.student_updates, **seconds, **memory, **found}


def _data(chosen: Settings) -> Dataset:
    return load_dataset(chosen.data.name, chosen.data.root, **chosen.data.options)


def measure(sampler: Student, dataset: Dataset, seed: int) -> Result:
    """The measures of as many samples as there are real ones."""
    classifier = digits_classifier() if dataset.name == "digits" else None
    n = len(dataset.x) + len(dataset.held_out_x)
    condition: Mapping[str, torch.Tensor] = sampler.draw_condition(n, seed)
    samples = sampler.sample(n, condition, seed)
    report = sample_report(dataset, classifier, {"it": (samples, condition.get("label"))})
    return {name: report["samples"]["it"][name] for name in MEASURES}


@cache
def digits_classifier() -> DigitsClassifier:
    """The classifier of the digits, trained once for all cells."""
    return train_digits_classifier(load_dataset("digits"))


def figure(results: Results, theme: Theme) -> "Figure":
    """The distance of every method, at equal updates and at equal time, and lines for the teacher."""
    names = [name for name in results if name != "teacher" and not name.endswith(TIMED)]
    drawing, (axes,) = new_figure(1.5 + 0.9 * len(names), 3.6)
    for row, (suffix, colour, words) in enumerate(
        (("", theme.student, "equal student updates"), (TIMED, theme.auxiliary, "equal time"))
    ):
        for place, name in enumerate(names):
            values = _values(results.get(name + suffix, ()), "distance")
            axes.plot([place + 0.2 * row - 0.1] * len(values), values, "o", color=colour)
        axes.plot([], [], "o", color=colour, label=words)
    for steps in TEACHER_STEPS:
        level = _values([run["steps"][str(steps)] for run in results["teacher"]], "distance")
        axes.axhline(sum(level) / len(level), color=theme.teacher, linestyle=":", linewidth=1)
        end = (len(names) + 0.7, sum(level) / len(level))
        axes.annotate(_teacher_words(steps), end, color=theme.teacher, fontsize=8, ha="right", va="bottom")
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="distance to the data", xlim=(-0.5, len(names) + 0.7))
    logarithmic(axes, "y")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.93))
    return drawing


def _teacher_words(steps: int) -> str:
    return f"teacher, {steps} step{'s' if steps > 1 else ''}"


def _values(runs: Sequence[Result], key: str) -> list[float]:
    return [run[key] for run in runs if run.get(key) is not None]


def finding(results: Results) -> str:
    """The table in words: one line a row."""
    lines = [
        f"distance to the data, over that of the teacher with {REFERENCE} steps, precision / recall, CPU seconds of "
        "the distillation; mean of the seeds ± deviation"
    ]
    references = [run["steps"][REFERENCE]["distance"] for run in results["teacher"]]
    for steps in TEACHER_STEPS:
        found = [run["steps"][str(steps)] for run in results["teacher"]]
        lines.append(_line(_teacher_words(steps), found, references))
    for name, runs in results.items():
        if name != "teacher":
            lines.append(_line(name.replace(TIMED, ", equal time"), runs, references))
    return "\n".join(lines)


def _line(name: str, runs: Sequence[Result], references: Sequence[float]) -> str:
    failed = [run["error"] for run in runs if "error" in run]
    found: dict[str, Any] = {key: _values(runs, key) for key in (*MEASURES, *COSTS)}
    if not found["distance"]:
        return f"{name:24} failed: {failed[0]}"
    ratios = [run["distance"] / teacher for run, teacher in zip(runs, references, strict=True) if "distance" in run]
    words = f"{name:24} {spread_words(found['distance']):16} {spread_words(ratios) + ' x':16} "
    words += f"{spread_words(found['precision'])} / {spread_words(found['recall'])}"
    if found["class_agreement"]:
        words += f", class agreement {spread_words(found['class_agreement'])}"
    if found["cpu_seconds"]:
        words += f", {spread_words(found['cpu_seconds'])} s"
        words += f" for {round(sum(found['student_updates']) / len(found['student_updates']))} updates"
    if found["peak_bytes"]:
        words += f", peak memory {spread_words([count / MIB for count in found['peak_bytes']])} MiB"
    if any("left_out" in run for run in runs):
        words += f" ({len(found['distance'])} of {len(runs)} seeds)"
    return words + (f" ({len(failed)} of {len(runs)} seeds failed: {failed[0]})" if failed else "")


TABLE = Experiment(
    summary="all methods and the teacher on the same fields, trainer and measure",
    quick=TableSettings(
        preset="mixture-2d",
        student_updates=120,
        texts=(
            "data.options.num_samples=3000",
            "data.options.num_held_out=1000",
            "teacher.updates=500",
            "distill.student_optimizer.learning_rate=1e-3",
            "distill.student_optimizer.schedule=cosine",
            "distill.auxiliary_optimizer.schedule=cosine",
        ),
        own=POINTS,
    ),
    full=TableSettings(
        own=DIGITS,
        most=5.0,
        # The others' updates take about the time of the first one's.
        timed=("cd", "ayf", "meanflow", "imm", "reflow"),
        timed_seeds=1,
    ),
    cells=cells,
    run=run,
    figure=figure,
    finding=finding,
    seeds=3,
)
