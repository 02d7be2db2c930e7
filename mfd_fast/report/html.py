"""One self-contained HTML page about a run: no scripts, no outside resources, readable on paper."""

import json
import shlex
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mfd_fast.report import figures, words
from mfd_fast.report.extras import missing_extra
from mfd_fast.report.health import health_checks
from mfd_fast.report.occupancy import occupancy_section, occupancy_verdict
from mfd_fast.report.pictures import Picture, sample_pictures, training_pictures
from mfd_fast.report.record import RunRecord, column, numbers, read_run
from mfd_fast.report.series import summarise
from mfd_fast.report.theme import Theme, themed_uris
from mfd_fast.storage import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATE_WORDS = {"good": "Good", "look": "Look closer", "problem": "Problem", "unknown": "Unknown"}


class Chart(NamedTuple):
    """A figure of the page before it is drawn."""

    title: str
    explanation: str
    draw: "Callable[[RunRecord, Theme], Figure | None]"
    columns: tuple[tuple[str, str], ...] = ()
    """Role and column of the curves, for those who cannot see the figure."""


DISTANCE = Chart(
    "Distance to the real data",
    "Lower is better. The student is a match when its mark is as low as the right end of the teacher's line.",
    figures.distance_figure,
)
SECONDS = Chart("Seconds per phase", "Wall time and CPU time (summed over threads).", figures.seconds_figure)
CURVES = (
    Chart(
        "Velocity gap",
        "Root mean square of the teacher's minus the auxiliary's mean velocity on student samples. "
        "It falls as the student's samples become like the teacher's. Band: 10th to 90th percentile.",
        figures.velocity_gap_figure,
        (("student", "velocity_gap"),),
    ),
    Chart(
        "Velocity gap by time",
        "The same gap, split by the time t at which it was measured. Near t = 0 it is about details, near t = 1 about "
        "the overall shape.",
        figures.gap_map_figure,
    ),
    Chart(
        "Auxiliary loss",
        "The auxiliary learns the velocity of the student's samples. It may rise while they gain variety; a steady "
        "value after that means that it keeps up. It does not go to zero.",
        figures.auxiliary_loss_figure,
        (("auxiliary", "loss"),),
    ),
    Chart(
        "Gradient norms",
        "Before clipping. A slow change is normal, a sudden jump is not.",
        figures.gradient_norm_figure,
        (("auxiliary", "grad_norm"), ("student", "grad_norm")),
    ),
    Chart(
        "Spread of the student's samples",
        "It should settle near the dashed line; far below it the student has lost variety.",
        figures.spread_figure,
        (("student", "sample_std"),),
    ),
    Chart(
        "Teacher loss",
        "Training of the teacher, before distillation. It does not go to zero.",
        figures.teacher_loss_figure,
        (("teacher", "loss"),),
    ),
)


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all, and return its path.

    Whatever the folder lacks (a run before its evaluation, say) is missing from the page too, which says so in words.

    Raises:
        NotADirectoryError: run_folder is not an existing folder.
        ModuleNotFoundError: the ``report`` extra is not installed.
    """
    folder = Path(run_folder)
    page = render_report(read_run(folder))
    path = folder / "report.html"
    write_text(path, page)
    return path


def render_report(record: RunRecord) -> str:
    """The page as text."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = resources.files("mfd_fast.report").joinpath("template.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(_content(record))


def _content(record: RunRecord) -> dict[str, Any]:
    problems = list(record.problems)
    moments = training_pictures(record.training_pictures, problems)
    return {
        "record": record,
        "verdict": occupancy_verdict(record) or words.verdict(record),
        "state_words": STATE_WORDS,
        "facts": words.facts(record),
        "samples": sample_pictures(record),
        "occupancy": occupancy_section(record),
        "moments": moments,
        "distance": _draw(DISTANCE, record),
        "metric_rows": words.metric_rows(record),
        "checks": health_checks(record),
        "curves": [drawn for chart in CURVES if (drawn := _draw(chart, record)) is not None],
        "seconds": _draw(SECONDS, record),
        "phases": _phases(record),
        "versions": [(name, _plain(value)) for name, value in record.versions.items()],
        "next_step": words.next_step(record),
        "commands": _commands(record),
        "problems": problems,
    }


def _draw(chart: Chart, record: RunRecord) -> dict[str, Any] | None:
    uris = themed_uris(partial(chart.draw, record))
    if uris is None:
        return None
    spoken = [f"Chart: {chart.title}."]
    for role, key in chart.columns:
        series = summarise(*column(record.log(role), key))
        if len(series.middle):
            first, last = words.show(series.middle[0]), words.show(series.middle[-1])
            spoken.append(f"{role.capitalize()}: {first} at first, {last} at last.")
    return {"picture": Picture(chart.title, " ".join(spoken), *uris), "text": chart.explanation}


def _phases(record: RunRecord) -> list[tuple[str, str, str]]:
    wall, cpu = numbers(record.metrics.get("seconds")), numbers(record.metrics.get("cpu_seconds"))
    rows = [
        (
            name.replace("_", " "),
            words.show_seconds(wall[name]) if name in wall else "",
            words.show_seconds(cpu[name]) if name in cpu else "",
        )
        for name in dict.fromkeys([*wall, *cpu])
    ]
    if len(rows) > 1:
        totals = [words.show_seconds(sum(clock.values())) if clock else "" for clock in (wall, cpu)]
        rows.append(("total", totals[0], totals[1]))
    return rows


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _commands(record: RunRecord) -> list[tuple[str, str]]:
    place = shlex.quote(record.place)
    rows = []
    if record.settings_text is not None:
        options = f"--settings {place}/settings.toml --run {shlex.quote(record.place + '-again')}"
        factory = record.student_network.get("factory")
        own = f" --teacher {shlex.quote(str(factory))} --weights WEIGHTS.safetensors" if factory else ""
        train = f"mfd-fast train-teacher {options}\n" if record.teacher_log and not own else ""
        # A teacher without a log was not trained in this run.
        taken = f" --teacher-run {place}" if record.teacher and not record.teacher_log and not own else ""
        rows.append(("The same run again, in a new folder", f"{train}mfd-fast distill {options}{own}{taken}"))
    if record.is_pictured:
        rows.append(("Pictures of its student", words.next_step(record)))
        rows.append(("The student as a LoRA file for diffusers", f"mfd-fast export {place} lora"))
    elif record.student:
        trust = " --trust-code" if "factory" in record.student_network else ""
        sample = f"mfd-fast sample {place} --num 64 --seed 0 --out samples.npz{trust}"
        rows.append(("Samples from its student", sample))
        rows.append(("Measure its student again", words.next_step(record)))
    rows.append(("Write this page again", f"mfd-fast report {place}"))
    return rows
