"""Scatter plots of 2-D samples."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mfd_fast.report.record import Samples
from mfd_fast.report.theme import Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Limits = tuple[float, float]

MOST_POINTS = 1500
"""Points drawn per panel."""


def scatter_figure(
    panels: dict[str, NDArray[np.float32]], theme: Theme, limits: tuple[Limits, Limits] | None = None
) -> "Figure":
    """2-D points ``[N, 2]`` side by side on equal axes: title -> points, for example teacher, student and data.

    The colour follows the first word of a title. ``limits`` are those of x and y, by default `scatter_limits`. A
    single panel has no title.

    Raises:
        ValueError: there is no panel, or one is not ``[N, 2]`` with N at least 1.
    """
    limits = scatter_limits(panels) if limits is None else limits
    aspect = (limits[1][1] - limits[1][0]) / (limits[0][1] - limits[0][0])
    height = min(4.0, max(1.6, 2.6 * aspect + 0.6))
    figure, all_axes = new_figure(width=3.3 * len(panels), height=height, columns=len(panels))
    for axes, (title, points) in zip(all_axes, panels.items(), strict=True):
        shown = points[:MOST_POINTS]
        colour = theme.of(title.replace(",", " ").split(" ")[0].lower())
        axes.scatter(shown[:, 0], shown[:, 1], s=5, color=colour, alpha=0.5, linewidths=0)
        axes.set(title=title if len(panels) > 1 else "", xlabel="x", ylabel="y", aspect="equal")
        axes.set(xlim=limits[0], ylim=limits[1])
    return figure


def scatter_limits(panels: dict[str, NDArray[np.float32]]) -> tuple[Limits, Limits]:
    """Limits of x and y that hold all but the outermost of all panels' points."""
    if not panels:
        raise ValueError("panels must hold at least one entry, got none")
    for title, points in panels.items():
        if points.ndim != 2 or points.shape[1] != 2 or not len(points):
            raise ValueError(f"panels[{title!r}] must be points [N, 2], got shape {list(points.shape)}")
    points = np.concatenate([points[np.isfinite(points).all(axis=1)] for points in panels.values()])
    low, high = np.percentile(points, [0.5, 99.5], axis=0) if len(points) else (np.zeros(2), np.ones(2))
    margin = np.maximum(0.1 * (high - low), 1e-3)
    low, high = low - margin, high + margin
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def points_of(samples: Samples) -> NDArray[np.float32] | None:
    """The samples as 2-D points ``[N, 2]``, or None when they are something else."""
    return samples.x if samples.x.ndim == 2 and samples.x.shape[1] == 2 else None
