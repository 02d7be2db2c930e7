"""The part of a report that is about forecast occupancy: a table by horizon, and pictures from above."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mfd_fast.report.grid import image_grid, picture_uri
from mfd_fast.report.pictures import WIDEST_PANEL, Picture
from mfd_fast.report.record import RunRecord, finite
from mfd_fast.report.words import State, Verdict, show

NEAR_TEACHER = 0.9
"""A student matches its teacher from this share of its IoU on."""
FAR_FROM_TEACHER = 0.7

# Labels 0 to 16 and free: colours for people, with driving surfaces pale and what moves strong.
COLOURS = (
    *("#7f7f7f", "#b15928", "#cc79a7", "#e69f00", "#0072b2", "#8c510a", "#6a3d9a", "#d62728", "#f0c000", "#17a2a2"),
    *("#d55e00", "#c8bfd0", "#9e9e9e", "#b8a0c8", "#c5d6a5", "#5d6d7e", "#4c9a54", "#ffffff"),
)
_NAMES = {"recorded": "Recorded latents", "repeated": "Last frame again", "truth": "Ground truth"}


class Row(NamedTuple):
    """One line of the table."""

    name: str
    cells: list[str]
    is_student: bool


class OccupancySection(NamedTuple):
    """Everything that the page shows about forecasts."""

    note: str
    columns: list[str]
    rows: list[Row]
    pictures: list[Picture]
    legend: list[tuple[str, str]]
    """Name and colour of the classes that appear."""


def occupancy_section(record: RunRecord) -> OccupancySection | None:
    """The section, or None for a run without forecasts of occupancy."""
    entry = record.metrics.get("occupancy")
    rows = _rows(entry)
    if not rows or not isinstance(entry, Mapping):
        return None
    names = ["IoU", "mIoU"] if "mean_iou" in rows[0] else ["RMS distance"]
    keys = ["iou", "miou"] if "mean_iou" in rows[0] else ["latent_rms"]
    horizons = len(rows[0].get(keys[0], ()))
    columns = [f"{name}, mean" for name in names] + ["Frames per second"]
    columns += [f"{name}, +{horizon}" for horizon in range(1, horizons + 1) for name in names]
    table = []
    for row in rows:
        values = [row.get(f"mean_{key}") for key in keys] + [row.get("frames_per_second")]
        values += [_at(row.get(key), horizon) for horizon in range(horizons) for key in keys]
        table.append(Row(_name(row.get("role"), row.get("steps")), [show(v) for v in values], row["role"] == "student"))
    pictures, labels = _pictures(record.views)
    classes = list(rows[0].get("classes", ()))
    legend = [(classes[label], COLOURS[label]) for label in labels if label < len(classes)]
    return OccupancySection(_note(entry), columns, table, pictures, legend)


def occupancy_verdict(record: RunRecord) -> Verdict | None:
    """The outcome of a run that forecasts occupancy, None for other runs."""
    rows = _rows(record.metrics.get("occupancy"))
    measured = [(row["role"], row.get("steps"), finite(row.get("mean_iou"))) for row in rows]
    students = [(steps, value) for role, steps, value in measured if role == "student" and value is not None]
    teachers = {
        steps: value
        for role, steps, value in measured
        if role == "teacher" and value is not None and isinstance(steps, int)
    }
    if not rows:
        return None
    if not students or not teachers:
        return Verdict("unknown", "The forecasts were compared as latents; no IoU was measured.", "")
    (steps, student), most = students[0], max(teachers)
    at_start = f" (and {show(teachers[1])} at one step)" if 1 in teachers and most != 1 else ""
    plural = "s" if most != 1 else ""
    sentence = (
        f"The {steps}-step student reaches an IoU of {show(student)}; its teacher has {show(teachers[most])} at {most} "
        f"step{plural}{at_start}."
    )
    share = student / teachers[most] if teachers[most] > 0 else 0.0
    state: State = "good" if share >= NEAR_TEACHER else "look" if share >= FAR_FROM_TEACHER else "problem"
    detail = "Means over all horizons, in per cent; higher is better."
    repeated = next((value for role, _, value in measured if role == "repeated" and value is not None), 0.0)
    if state == "good" and teachers[most] <= repeated:  # as good as a teacher that forecasts nothing
        state, detail = "look", f"{detail} The last frame again has {show(repeated)}: the teacher learned too little."
    return Verdict(state, sentence, detail)


def _rows(entry: object) -> list[Mapping[str, Any]]:
    rows = entry.get("rows") if isinstance(entry, Mapping) else None
    return [row for row in rows if isinstance(row, Mapping) and "role" in row] if isinstance(rows, list) else []


def _note(entry: Mapping[str, Any]) -> str:
    counted = f"{entry.get('windows')} held-out windows, the same noise for all; frames per second at batch size "
    counted += f"{entry.get('batch_size')}. "
    if entry.get("scored") == "occupancy":
        return counted + "Shares in per cent; +1 is the first frame after the history. Higher is better."
    return counted + "There was no decoder or no recorded occupancy, so latents were compared. Lower is better."


def _at(values: object, index: int) -> object:
    return values[index] if isinstance(values, Sequence) and index < len(values) else None


def _name(role: object, steps: object) -> str:
    if not isinstance(steps, int):
        return _NAMES.get(str(role), str(role))
    return f"{str(role).capitalize()}, {steps} step{'s' if steps != 1 else ''}"


def _pictures(views: Mapping[str, NDArray[np.uint8]]) -> tuple[list[Picture], list[int]]:
    """One picture for each forecast, windows below each other and frames beside each other; the labels in them."""
    teachers = sorted((name for name in views if name.startswith("teacher-")), key=lambda name: int(name[8:]))
    students = [name for name in views if name.startswith("student-")]
    order = [name for name in ("truth", *teachers[-1:], *students, *teachers[:-1][:1]) if name in views]
    pictures = []
    for name in order:
        windows, frames, height, width = views[name].shape
        scale = max(1, WIDEST_PANEL // (frames * width))
        colours = np.array([[int(text[i : i + 2], 16) for i in (1, 3, 5)] for text in COLOURS], dtype=np.float32)
        # The vehicle looks along the first axis: up in the picture.
        seen = views[name][:, :, ::-1].reshape(windows * frames, height, width)
        pixels = colours[np.minimum(seen, len(COLOURS) - 1)].transpose(0, 3, 1, 2)
        role, _, steps = name.partition("-")
        title = _name(role, int(steps) if steps else None)
        alt = f"{title}: {windows} windows below each other, {frames} frames side by side, seen from above."
        pictures.append(Picture(title, alt, picture_uri(image_grid(pixels, frames, scale, (0.0, 255.0))), None))
    return pictures, sorted({int(label) for name in order for label in np.unique(views[name])})
