"""The two looks of a figure (for light and for dark pages) and its way into a page."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mfd_fast.report.extras import missing_extra
from mfd_fast.report.grid import data_uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

LARGEST_SVG = 45_000
"""A figure whose SVG has more bytes becomes a PNG if that is smaller."""


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; those of the roles and phases are from the palette of Okabe and Ito (2008)."""

    name: str
    text: str
    muted: str
    grid: str
    teacher: str
    auxiliary: str
    student: str
    data: str
    phases: tuple[str, ...]

    def of(self, role: str) -> str:
        """The colour of a role: teacher, auxiliary, student or data."""
        return {"teacher": self.teacher, "auxiliary": self.auxiliary, "student": self.student}.get(role, self.data)


_PHASES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8c8c8c")
LIGHT = Theme("light", "#1b1f24", "#59636e", "#d9dee3", "#0072b2", "#00805c", "#d55e00", "#59636e", _PHASES)
DARK = Theme("dark", "#e6e9ec", "#9aa4ae", "#3a424b", "#56b4e9", "#2fc79a", "#f5a742", "#aab4be", _PHASES)


@contextmanager
def drawing_style(theme: Theme) -> Iterator[None]:
    """Figures made and saved inside have the theme's look, whatever the user's matplotlib settings are."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_style(theme))
        yield


def _style(theme: Theme) -> dict[Any, Any]:
    return {
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.titlecolor": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.muted,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        "text.color": theme.text,
        # Names come from files of the run: a dollar sign in one is no formula.
        "text.parse_math": False,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.text,
        "ytick.labelcolor": theme.text,
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "svg.hashsalt": "mfd_fast",
    }


def new_figure(width: float = 5.6, height: float = 3.1, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure of ``width`` x ``height`` inches with ``columns`` axes side by side, bound to no window."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def plain_ticks(axis: "Axis", low: float, high: float) -> None:
    """Ticks 1, 2, 5, 10, ... written out (only powers of ten where the range is wide) on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if low > 0 and high / low < 200:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def figure_uri(figure: "Figure") -> str:
    """A data URI of the figure: SVG, or PNG where the SVG would be large (many points)."""
    vector = io.BytesIO()
    figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
    if vector.tell() <= LARGEST_SVG:
        return data_uri(vector.getvalue(), "image/svg+xml")
    raster = io.BytesIO()
    figure.savefig(raster, format="png", dpi=130, metadata={"Software": None})
    if raster.tell() < vector.tell():
        return data_uri(raster.getvalue(), "image/png")
    return data_uri(vector.getvalue(), "image/svg+xml")


def themed_uris(draw: "Callable[[Theme], Figure | None]") -> tuple[str, str] | None:
    """Data URIs of a figure drawn for light and for dark pages, or None when there is nothing to draw."""
    uris = []
    for theme in (LIGHT, DARK):
        with drawing_style(theme):
            figure = draw(theme)
            if figure is None:
                return None
            uris.append(figure_uri(figure))
    return uris[0], uris[1]
