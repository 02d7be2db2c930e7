"""Long log columns made short enough to draw."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mfd_fast.report.record import LogLines, finite, number

MOST_POINTS = 80


class Series(NamedTuple):
    """A column in at most ``MOST_POINTS`` groups of neighbouring updates; all arrays have one entry per group."""

    update: NDArray[np.float64]
    middle: NDArray[np.float64]
    """Median of the group."""
    low: NDArray[np.float64]
    """10th percentile of the group."""
    high: NDArray[np.float64]
    """90th percentile of the group."""


def summarise(updates: NDArray[np.float64], values: NDArray[np.float64], most_points: int = MOST_POINTS) -> Series:
    """Median, 10th and 90th percentile of up to ``most_points`` groups; values that are not finite are left out."""
    usable = np.isfinite(values)
    updates, values = updates[usable], values[usable]
    parts = max(1, min(most_points, len(values)))
    groups = zip(np.array_split(updates, parts), np.array_split(values, parts), strict=True)
    rows = [(np.mean(u), *np.percentile(v, [50, 10, 90])) for u, v in groups if len(v)]
    table = np.array(rows, dtype=np.float64).reshape(-1, 4)
    return Series(table[:, 0], table[:, 1], table[:, 2], table[:, 3])


class GapMap(NamedTuple):
    """The velocity gap per time bin, in groups of neighbouring updates."""

    gap: NDArray[np.float64]
    """``[bins, groups]``, NaN where no time fell into the bin."""
    first: float
    last: float


def gap_map(lines: LogLines, most_points: int = MOST_POINTS // 2) -> GapMap | None:
    """Means of ``velocity_gap_bins`` over groups of lines; None when no line has any, or their lengths differ."""
    rows = [
        (update, [math.nan if (value := number(entry)) is None else value for entry in bins])
        for line in lines
        if isinstance(bins := line.get("velocity_gap_bins"), list)
        and bins
        and (update := finite(line.get("update"))) is not None
    ]
    if not rows or len({len(bins) for _, bins in rows}) != 1:
        return None
    values = np.array([bins for _, bins in rows], dtype=np.float64)
    values[~np.isfinite(values)] = math.nan
    groups = np.array_split(values, min(most_points, len(values)))
    table = np.stack([_mean_of_finite(group) for group in groups], axis=1)
    return GapMap(table, rows[0][0], rows[-1][0]) if np.isfinite(table).any() else None


def _mean_of_finite(group: NDArray[np.float64]) -> NDArray[np.float64]:
    counts = np.isfinite(group).sum(axis=0)
    sums = np.nansum(group, axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)
