"""Logarithmic axes with numbers written out."""

from typing import TYPE_CHECKING

from mfd_fast.report.theme import plain_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def logarithmic(axes: "Axes", which: str, scale: str = "log") -> None:
    """Make the axes "x", "y" or "xy" logarithmic; call it when everything is drawn."""
    for name in which:
        axes.set(**{f"{name}scale": scale})
        low, high = axes.get_xlim() if name == "x" else axes.get_ylim()
        plain_ticks(axes.xaxis if name == "x" else axes.yaxis, low, high)
