"""Distance: rms of ``u_T - u_A`` over a training on the eight Gaussians. The paper sees a rise, a plateau, a slow fall.

It is not a loss that goes to zero by itself: student and auxiliary begin as the teacher, where it is zero.
"""

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mfd_fast.experiments.base import Experiment, Result, Results, Work, spread_words
from mfd_fast.experiments.drawing import logarithmic
from mfd_fast.experiments.points import distilled, points_settings
from mfd_fast.report.record import column, read_run
from mfd_fast.report.theme import Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class DistanceSettings:
    """Sizes of the experiment."""

    teacher_updates: int = 800
    student_updates: int = 600
    step_size: float = 0.05


def run(settings: DistanceSettings, cell: str, work: Work) -> Result:
    """The gap of every student update."""
    chosen = points_settings(work.seed, settings.teacher_updates, settings.student_updates, settings.step_size)
    record = read_run(distilled(chosen, work.folder / "training", work.folder / "teacher").path)
    _, gaps = column(record.student_log, "velocity_gap")
    return {"gap": [round(float(gap), 6) for gap in gaps]}


def smoothed(values: list[float], width: int) -> list[float]:
    """Medians of ``width`` values around each."""
    half = width // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def phases(gaps: list[float]) -> dict[str, float]:
    """First, highest and last smoothed gap; the share of the training at which it is highest, and until which it stays
    above 80 % of that.
    """
    curve = smoothed(gaps, max(3, len(gaps) // 40))
    peak = max(range(len(curve)), key=curve.__getitem__)
    high = [index for index, gap in enumerate(curve) if gap >= 0.8 * curve[peak]]
    return {
        "first": curve[0],
        "highest": curve[peak],
        "last": curve[-1],
        "peak_at": peak / len(curve),
        "plateau_until": (high[-1] + 1) / len(curve),
    }


def figure(results: Results, theme: Theme) -> "Figure":
    """The gaps on a logarithmic axis."""
    drawing, (axes,) = new_figure(6.5, 3.2)
    for index, run in enumerate(results["training"]):
        axes.plot(run["gap"], color=theme.student, alpha=0.25, linewidth=0.8)
        curve = smoothed(run["gap"], max(3, len(run["gap"]) // 40))
        axes.plot(curve, color=theme.student, label=None if index else "rolling median")
    axes.set(xlabel="student updates", ylabel="rms of u_T - u_A")
    logarithmic(axes, "y")
    axes.legend()
    return drawing


def finding(results: Results) -> str:
    """The three phases in numbers."""
    found = [phases(run["gap"]) for run in results["training"]]
    words = {key: spread_words([each[key] for each in found]) for key in found[0]}
    share = {key: spread_words([100 * each[key] for each in found]) for key in ("peak_at", "plateau_until")}
    return (
        f"The rms of u_T - u_A begins at {words['first']}, is highest at {share['peak_at']} % of the training with "
        f"{words['highest']}, last lies above 80 % of that at {share['plateau_until']} %, and ends at {words['last']}."
    )


DISTANCE = Experiment(
    summary="the distance of the mean velocities of teacher and auxiliary over a training",
    quick=DistanceSettings(teacher_updates=300, student_updates=200),
    full=DistanceSettings(),
    cells=lambda settings: ("training",),
    run=run,
    figure=figure,
    finding=finding,
)
