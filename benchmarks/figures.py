"""The figures of a comparison: error against time, and time against size."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

MARKS = {"mfd_fast": ("o", "#c1121f"), "diffrax": ("s", "#2a6f97"), "torchdiffeq": ("^", "#6c757d"),
         "torchode": ("v", "#6c757d"), "released": ("D", "#b08968"), "eager": ("x", "#343a40"),
         "row": ("+", "#343a40")}  # fmt: skip
LINES = {"compiled": "#c1121f", "eager": "#e09f3e", "torchdiffeq": "#6c757d"}


def draw_all(results: dict[str, Any], folder: Path, name: str) -> None:
    """Write the figures beside the results."""
    work_precision(results).savefig(folder / f"{name}-work-precision.png", dpi=90)
    if "scaling" in results:
        scaling(results["scaling"]).savefig(folder / f"{name}-scaling.png", dpi=90)


def work_precision(results: dict[str, Any]) -> Figure:
    """Gradient error against milliseconds, medians over the draws: the ways numbered from fast to slow, the searched
    pairs joined.
    """
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    for who in ("mfd_fast", "diffrax"):
        mark, colour = MARKS[who]
        pairs = sorted(_medians(pair) for pair in results["work_precision"] if pair["who"] == who)
        if pairs:
            axes.plot(*zip(*pairs, strict=True), mark + "-", color=colour, markersize=3, linewidth=0.8, alpha=0.5)
    ways = sorted(results["ways"], key=lambda way: _medians(results["ways"][way]))
    for number, way in enumerate(ways, 1):
        mark, colour = MARKS[way.split()[0]]
        point = _medians(results["ways"][way])
        axes.plot(*point, mark, color=colour, label=f"{number}  {way}")
        above = number % 2  # neighbours may lie on each other
        place = {"xytext": (0, 7 if above else -7), "va": "bottom" if above else "top"}
        axes.annotate(str(number), point, fontsize=9, textcoords="offset points", ha="center", **place)
    axes.set(xscale="log", yscale="log", xlabel="CPU milliseconds of one pair of mean velocities, 64 rows",
             ylabel="relative error of the gradient")  # fmt: skip
    axes.set_title("DiT, 16 tokens, width 256, depth 6; guidance 4.5; one thread", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper", frameon=False)
    return figure


def _medians(measured: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds and gradient error."""
    return 1e3 * statistics.median(measured["seconds"]), statistics.median(measured["gradient_error"])


def scaling(measured: dict[str, Any]) -> Figure:
    """Milliseconds against batch, step size, width and depth."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    base = measured["base"]
    for place, axis in enumerate(("rows", "step_size", "width", "depth")):
        axes = figure.add_subplot(2, 2, place + 1)
        values = [float(value) for value in measured[axis]]
        for way, colour in LINES.items():
            times = [1e3 * case[way] for case in measured[axis].values()]
            axes.plot(values, times, "o-", color=colour, label=way, markersize=3)
        rest = ", ".join(f"{name} {value:g}" for name, value in base.items() if name != axis)
        axes.set_title(rest, fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel=axis.replace("_", " "), ylabel="milliseconds")
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].legend(fontsize=8)
    return figure
