"""No auxiliary: with the conditional velocity ``e - x0`` in the auxiliary's place the student collapses.

The affine student ``a + b z`` has, with ``c`` the slope of the teacher's mean velocity,

    gradient of a = E[(1-t) (1 + (1-t) c)] (a - mean)             with and without the auxiliary
    gradient of b = E[(1-t)^2 (c - c_auxiliary)] b                with it: zero at b = std
    gradient of b = E[(1-t) (1 + (1-t) c)] b                      without: zero at b = 0 only

so that it ends as the mean of the data and nothing else. Each descent is run twice: with these, and with gradients of
batches of samples.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mfd_fast.experiments.affine import MEAN, STD, TEACHER, Gradient, Points, courses, exact_gap, interval_grid, slope
from mfd_fast.experiments.base import Experiment, Result, Results, Work, spread_words
from mfd_fast.path import conditional_velocity
from mfd_fast.report.theme import Theme, new_figure
from mfd_fast.streams import make_generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELLS = ("with", "without")


@dataclass(frozen=True)
class NoAuxiliarySettings:
    """Sizes of the experiment."""

    updates: int = 1500
    learning_rate: float = 0.1
    rows: int = 1024
    start: tuple[float, float] = (-2.0, 1.5)


def conditional_gap(points: Points, a: float, b: float) -> Tensor:
    """``u_T - (e - x0)``."""
    return TEACHER.mean_velocity(points.x_t, points.t, points.r) - conditional_velocity(points.data, points.noise)


def exact_gradient(cell: str) -> Gradient:
    """The expectations of the module, over intervals with uniform ends."""
    t, r = interval_grid()
    teacher = slope(STD, t, r)
    shared = ((1 - t) * (1 + (1 - t) * teacher)).mean().item()

    def gradient(a: float, b: float) -> tuple[float, float]:
        if cell == "without":
            return shared * (a - MEAN), shared * b
        pull = ((1 - t).square() * (teacher - slope(max(abs(b), 1e-6), t, r))).mean().item()
        return shared * (a - MEAN), pull * b

    return gradient


def run(settings: NoAuxiliarySettings, cell: str, work: Work) -> Result:
    """The courses of (a, b), exact and sampled."""
    gap = exact_gap if cell == "with" else conditional_gap
    budget = (settings.start, settings.updates, settings.learning_rate, settings.rows)
    return courses(exact_gradient(cell), gap, *budget, make_generator(work.seed, f"no-auxiliary/{cell}"))


def figure(results: Results, theme: Theme) -> "Figure":
    """Mean and width of the student over updates."""
    drawing, axes = new_figure(9.0, 3.2, 2)
    for axis, key, goal, words in zip(axes, "ab", (MEAN, STD), ("mean a", "width b"), strict=True):
        for cell, colour in zip(CELLS, (theme.student, theme.teacher), strict=True):
            exact, sampled = (results[cell][0][kind][key] for kind in ("exact", "sampled"))
            axis.plot(exact, color=colour, label=f"{cell} auxiliary, closed form")
            axis.plot(sampled, "--", color=theme.muted, linewidth=1)
        axis.axhline(goal, color=theme.data, linestyle=":", label="data")
        axis.set(xlabel="share of the updates, %", ylabel=f"{words} of the student")
        count = len(results["with"][0]["exact"][key]) - 1
        axis.set_xticks([count * share / 4 for share in range(5)], ["0", "25", "50", "75", "100"])
    axes[1].legend(loc="upper right")
    return drawing


def finding(results: Results) -> str:
    """Where the students end."""
    ends = {
        (cell, key): spread_words([run["sampled"][key][-1] for run in results[cell]]) for cell in CELLS for key in "ab"
    }
    exact = results["without"][0]["exact"]["b"][-1]
    return (
        f"Data N({MEAN}, {STD}^2). With its auxiliary the student ends at mean {ends['with', 'a']}, width "
        f"{ends['with', 'b']}. With e - x0 in the auxiliary's place it ends at mean {ends['without', 'a']}, width "
        f"{ends['without', 'b']} (closed form: {exact:.2g}): the mean is right and the width is lost."
    )


NO_AUXILIARY = Experiment(
    summary="without the auxiliary the student collapses to the mean of the data",
    quick=NoAuxiliarySettings(updates=300, learning_rate=0.3, rows=512),
    full=NoAuxiliarySettings(),
    cells=lambda settings: CELLS,
    run=run,
    figure=figure,
    finding=finding,
)
