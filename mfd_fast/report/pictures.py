"""Sample pictures of a run, chosen and enlarged for the page."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mfd_fast.report.grid import image_grid, load_picture, picture_uri
from mfd_fast.report.record import RunRecord, Samples, steps_in
from mfd_fast.report.scatter import points_of, scatter_figure, scatter_limits
from mfd_fast.report.theme import themed_uris

WIDEST_PANEL = 700
"""Pixels across one grid of samples."""
MOST_ROWS = 10
MOST_COLUMNS = 8
MOST_MOMENTS = 6


class Picture(NamedTuple):
    """One picture of the page."""

    title: str
    alt: str
    light: str
    """Data URI."""
    dark: str | None
    """Data URI for dark pages, None where the same picture serves both."""


class SamplePictures(NamedTuple):
    """The samples side by side, and a sentence on how they were chosen."""

    pictures: list[Picture]
    note: str


def sample_pictures(record: RunRecord) -> SamplePictures | None:
    """Grids (or scatter plots) of the evaluated samples; None when the run has none that can be shown."""
    groups = {stem: record.samples[stem] for stem in _panels(record.samples)}
    points = {_title(stem): flat for stem, group in groups.items() if (flat := points_of(group)) is not None}
    if points:
        return SamplePictures(_scatter_pictures(points), "All panels have the same axes.")
    groups = {stem: group for stem, group in groups.items() if group.x.ndim == 4 and group.x.shape[1] in (1, 3)}
    if not groups:
        return None
    choices, note = _choose(groups)
    pictures = []
    for stem, (rows, columns, index) in choices.items():
        grid = _grid(groups[stem].x[index], columns, record.value_range)
        alt = f"{_title(stem)}: {rows} rows of {columns} samples."
        pictures.append(Picture(_title(stem), alt, picture_uri(grid), None))
    return SamplePictures(pictures, note)


def training_pictures(paths: Sequence[Path], problems: list[str]) -> list[Picture]:
    """Up to six of the pictures saved during training, first and last included; a broken one is noted in problems."""
    chosen = (
        [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, MOST_MOMENTS).round().astype(int))] if paths else []
    )
    pictures = []
    for path in chosen:
        try:
            pixels = load_picture(path)
        except (OSError, ValueError, SyntaxError) as error:
            problems.append(f"samples/{path.name} could not be read ({type(error).__name__}) and was left out.")
            continue
        update = path.stem.partition("-")[2]
        title = f"student update {int(update):,}" if update.isdecimal() else path.stem
        alt = f"The student's samples from fixed noise at {title}."
        pictures.append(Picture(title, alt, picture_uri(pixels, most_bytes=30_000), None))
    return pictures


def _scatter_pictures(points: dict[str, NDArray[np.float32]]) -> list[Picture]:
    limits = scatter_limits(points)
    pictures = []
    for title, panel in points.items():
        uris = themed_uris(partial(scatter_figure, {title: panel}, limits=limits))
        if uris is not None:
            pictures.append(Picture(title, f"{title}: scatter plot of {len(panel):,} points.", *uris))
    return pictures


def _panels(stems: Iterable[str]) -> list[str]:
    """The files to show, in order: teacher at its most steps, students, teacher at its fewest steps, real data."""
    by_steps = sorted(stems, key=steps_in)
    teachers = [stem for stem in by_steps if stem.startswith("teacher-")]
    students = [stem for stem in by_steps if stem.startswith("student-")]
    data = [stem for stem in by_steps if stem == "data"]
    return [*teachers[-1:], *students, *teachers[:-1][:1], *data]


def _title(stem: str) -> str:
    if stem == "data":
        return "Real data"
    steps = steps_in(stem)
    return f"{stem.partition('-')[0].capitalize()}, {steps} step{'s' if steps != 1 else ''}"


def _choose(groups: dict[str, Samples]) -> tuple[dict[str, tuple[int, int, NDArray[np.int64]]], str]:
    generated = [group for stem, group in groups.items() if stem != "data"]
    labels = [group.condition for group in generated]
    paired = all(len(group.x) == len(generated[0].x) for group in generated) and all(
        np.array_equal(label, labels[0]) if label is not None and labels[0] is not None else label is labels[0]
        for label in labels
    )
    choices = {stem: _pick(group) for stem, group in groups.items()}
    labelled = all(group.condition is not None for group in groups.values())
    notes = ["Each row is one class."] if labelled else []
    if len(generated) > 1 and paired:
        notes.append(f"The same place in each grid has the same noise{' and the same label' if labelled else ''}.")
    elif len(generated) > 1:
        notes.append("The files hold different labels, so places in the grids do not correspond.")
    return choices, " ".join(notes)


def _pick(group: Samples) -> tuple[int, int, NDArray[np.int64]]:
    """Rows, columns and the samples to show: one class per row where there are labels, else the first ones."""
    columns = max(2, min(MOST_COLUMNS, WIDEST_PANEL // group.x.shape[3]))
    rows = max(2, min(MOST_ROWS, 900 // group.x.shape[2]))
    if group.condition is None:
        count = min(len(group.x), rows * columns)
        return -(-count // columns), columns, np.arange(count)
    classes = np.unique(group.condition)[:rows]
    members = [np.flatnonzero(group.condition == label) for label in classes]
    columns = min(columns, min(len(indices) for indices in members))
    return len(members), columns, np.concatenate([indices[:columns] for indices in members])


def _grid(x: NDArray[np.float32], columns: int, value_range: tuple[float, float]) -> NDArray[np.uint8]:
    return image_grid(x, columns, max(1, WIDEST_PANEL // (columns * x.shape[3])), value_range)
