"""The figures of a report. Each function returns None when the run holds nothing to draw.

They are called inside `mfd_fast.report.theme.drawing_style`.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from mfd_fast.report.health import sample_spread
from mfd_fast.report.record import LogLines, RunRecord, column, finite, numbers
from mfd_fast.report.series import Series, gap_map, summarise
from mfd_fast.report.theme import Theme, new_figure, plain_ticks
from mfd_fast.report.words import distance_name, show, show_seconds, steps_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BOTH_ROLES = "updates (auxiliary and student)"
AXES_POINTS = 165
"""Height of the axes of a curve in points, roughly."""
LABEL_HEIGHT = 0.19
"""Height of a label of two lines as a share of that."""


def distance_figure(record: RunRecord, theme: Theme) -> "Figure | None":
    """Distance to the data over network steps per sample, for teacher and student; chance as a dashed line."""
    roles = {role: steps_of(record.metrics.get(role)) for role in ("teacher", "student")}
    if not any(roles.values()):
        return None
    figure, (axes,) = new_figure()
    floor = finite(record.metrics.get("data_half_half"))
    for role, distances in roles.items():
        _mark_distances(axes, role, distances, floor, theme)
    if floor is not None:
        _dashed(axes, floor, f"two halves of the real data {show(floor)}", theme)
    steps = sorted({step for distances in roles.values() for step in distances})
    drawn = [value for distances in roles.values() for value in distances.values()] + ([floor] if floor else [])
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.set_xticks([], minor=True)
    axes.margins(0.13, 0.2)
    if min(drawn) > 0:
        axes.set_ylim(min(drawn) / 2.2, max(drawn) * 2.2)
        _logarithmic(axes)
    axes.set_xlabel("network steps per sample")
    axes.set_ylabel(distance_name(record.metrics))
    return figure


def _dashed(axes: "Axes", value: float, words: str, theme: Theme) -> None:
    """A dashed line at a value to compare with, explained above the axes: beside it curves cross its words."""
    axes.axhline(value, color=theme.data, linestyle="--", linewidth=1.5)
    axes.set_title(f"\u2013 \u2013 \u2013  {words}", color=theme.data)


def _mark_distances(axes: "Axes", role: str, distances: dict[int, float], floor: float | None, theme: Theme) -> None:
    colour = theme.of(role)
    marker = "D" if role == "student" else "o"
    axes.plot(list(distances), list(distances.values()), color=colour, marker=marker, markersize=8)
    for i, (steps, value) in enumerate(distances.items()):
        label = f"{role} {show(value)}" if i == 0 else show(value)
        below = role == "student" or (i > 0 and floor is not None and value <= floor)  # away from the dashed line
        offset, side = ((10, -3 if below else 3), "left") if i == 0 else ((0, -9 if below else 9), "center")
        text = axes.annotate(label, (steps, value), offset, textcoords="offset points", color=colour, ha=side)
        text.set(va="top" if below else "bottom", fontweight="bold" if i == 0 else "normal")


def auxiliary_loss_figure(record: RunRecord, theme: Theme) -> "Figure | None":
    """The auxiliary's flow-matching loss over updates."""
    return _curves_figure({"auxiliary": (record.auxiliary_log, "loss")}, "flow-matching loss (mean square)", theme)


def teacher_loss_figure(record: RunRecord, theme: Theme) -> "Figure | None":
    """The teacher's flow-matching loss over updates."""
    return _curves_figure({"teacher": (record.teacher_log, "loss")}, "flow-matching loss (mean square)", theme)


def velocity_gap_figure(record: RunRecord, theme: Theme) -> "Figure | None":
    """The velocity gap between teacher and auxiliary over updates, on a logarithmic axis."""
    curves = {"student": (record.student_log, "velocity_gap")}
    return _curves_figure(curves, "velocity gap (rms)", theme, logarithmic=True, labelled=False)


def gradient_norm_figure(record: RunRecord, theme: Theme) -> "Figure | None":
    """The gradient norms of auxiliary and student over updates, on a logarithmic axis."""
    curves = {"auxiliary": (record.auxiliary_log, "grad_norm"), "student": (record.student_log, "grad_norm")}
    return _curves_figure(curves, "gradient norm", theme, logarithmic=True)


def spread_figure(record: RunRecord, theme: Theme) -> "Figure | None":
    """The standard deviation of the student's samples over updates, beside the one it should reach."""
    curves = {"student": (record.student_log, "sample_std")}
    figure = _curves_figure(curves, "standard deviation of samples", theme)
    reference = sample_spread(record)
    if figure is not None and reference is not None:
        axes = figure.axes[0]
        _dashed(axes, reference[1], f"{reference[0]} {show(reference[1])}", theme)
        axes.margins(y=0.15)
    return figure


def _curves_figure(
    curves: dict[str, tuple[LogLines, str]], label: str, theme: Theme, logarithmic: bool = False, labelled: bool = True
) -> "Figure | None":
    drawn: dict[str, Series] = {}
    for role, (lines, key) in curves.items():
        updates, values = column(lines, key)
        usable = values > 0 if logarithmic else np.isfinite(values)
        if usable.any():
            drawn[role] = summarise(updates[usable], values[usable])
    if not drawn:
        return None
    figure, (axes,) = new_figure()
    for role, series in drawn.items():
        axes.fill_between(series.update, series.low, series.high, color=theme.of(role), alpha=0.22, linewidth=0)
        axes.plot(series.update, series.middle, color=theme.of(role), marker="o" if len(series.update) == 1 else "")
    if logarithmic:
        _logarithmic(axes)
    axes.set_xlabel("teacher updates" if "teacher" in drawn else BOTH_ROLES)
    axes.set_ylabel(label)
    axes.margins(x=0.02)
    _label_ends(axes, drawn, theme, labelled)
    return figure


def _label_ends(axes: "Axes", drawn: dict[str, Series], theme: Theme, named: bool) -> None:
    """Write each curve's name and last value beside its end; a label too close to the one below it is moved up."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    lowest_free = -math.inf
    for role, series in sorted(drawn.items(), key=lambda item: float(item[1].middle[-1])):
        end = float(series.update[-1]), float(series.middle[-1])
        height = float(to_axes.transform(end)[1])
        lift = max(0.0, lowest_free - height)
        lowest_free = height + lift + LABEL_HEIGHT
        text = f"{role}\n{show(end[1])}" if named else show(end[1])
        offset = (7, lift * AXES_POINTS)
        label = axes.annotate(text, end, offset, textcoords="offset points", color=theme.of(role), va="center")
        label.set(fontweight="bold")


def _logarithmic(axes: "Axes") -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    plain_ticks(axes.yaxis, low, high)


def gap_map_figure(record: RunRecord, theme: Theme) -> "Figure | None":
    """The velocity gap per time bin over updates as a map; bins without a sample are left blank."""
    table = gap_map(record.student_log)
    if table is None:
        return None
    from matplotlib.colors import LogNorm

    figure, (axes,) = new_figure()
    positive = table.gap[table.gap > 0]
    logarithmic = len(positive) > 0 and positive.max() > 5 * positive.min()
    last = table.last if table.last > table.first else table.first + 1
    picture = axes.imshow(
        table.gap,
        cmap="cividis",
        norm=LogNorm(positive.min(), positive.max()) if logarithmic else None,
        extent=(table.first, last, 0, 1),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    axes.grid(False)
    axes.set_xlabel(BOTH_ROLES)
    axes.set_ylabel("time t (0 = data, 1 = noise)")
    bar = figure.colorbar(picture, ax=axes, label="velocity gap (rms)")
    if logarithmic:
        plain_ticks(bar.long_axis, float(positive.min()), float(positive.max()))
    bar.outline.set_visible(False)
    return figure


def seconds_figure(record: RunRecord, theme: Theme) -> "Figure | None":
    """Seconds per phase as two stacked bars, wall time and CPU time."""
    clocks = {"wall": numbers(record.metrics.get("seconds")), "CPU": numbers(record.metrics.get("cpu_seconds"))}
    clocks = {clock: phases for clock, phases in clocks.items() if sum(phases.values()) > 0}
    if not clocks:
        return None
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(phase for phases in clocks.values() for phase in phases))
    colours = {name: theme.phases[i % len(theme.phases)] for i, name in enumerate(names)}
    legend_rows = math.ceil(len(names) / 3)
    figure, (axes,) = new_figure(height=0.9 + 0.55 * len(clocks) + 0.25 * legend_rows)
    longest = max(sum(phases.values()) for phases in clocks.values())
    for row, phases in enumerate(clocks.values()):
        _stack(axes, row, phases, colours, longest, theme)
    axes.set_yticks(range(len(clocks)), list(clocks))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.2)
    axes.set_xlabel("seconds")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [Patch(color=colours[name], label=name.replace("_", " ")) for name in names]
    figure.legend(handles=handles, loc="outside upper left", ncols=math.ceil(len(names) / legend_rows))
    return figure


def _stack(
    axes: "Axes", row: int, phases: dict[str, float], colours: dict[str, str], longest: float, theme: Theme
) -> None:
    start = 0.0
    for name, seconds in phases.items():
        axes.barh(row, seconds, left=start, height=0.62, color=colours[name], edgecolor="white", linewidth=0.8)
        if seconds > 0.14 * longest:
            ink = _ink_on(colours[name])
            axes.text(start + seconds / 2, row, show_seconds(seconds), color=ink, ha="center", va="center", fontsize=10)
        start += seconds
    total = f" {show_seconds(start)}"
    axes.text(start, row, total, color=theme.text, ha="left", va="center", fontweight="bold")


def _ink_on(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.4 else "white"
