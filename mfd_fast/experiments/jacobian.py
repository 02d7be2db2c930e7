"""The omitted Jacobian: the gradient of ``1/2 |u_A - u_T|^2`` through both rollouts, beside that of MFD.

For the affine toy, with ``D = c_A - c_T`` (positive for a student narrower than the teacher),

    full gradient with respect to x_t = D (u_A - u_T) = -D times that of MFD:

against it where the student is narrower, zero where the widths agree whatever the means are.

* ``cosine``: the package's differentiable rollouts against that;
* ``narrow``, ``right``, ``wide``: descent with the full gradient, by its expectations
  ``-E[(1-t) D (1+(1-t) c_T)] (a - mean)`` and ``E[(1-t)^2 D^2] b``, and by batches;
* ``network``: both gradients for networks on the eight Gaussians.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mfd_fast.closed_forms import Gaussian
from mfd_fast.experiments.affine import (
    MEAN,
    STD,
    TEACHER,
    Points,
    courses,
    draw_points,
    exact_gap,
    interval_grid,
    slope,
)
from mfd_fast.experiments.base import Experiment, Result, Results, Work, spread_words
from mfd_fast.experiments.drawing import logarithmic
from mfd_fast.experiments.points import distilled, points_settings, probe, snapshot
from mfd_fast.mean_velocity import mean_velocity
from mfd_fast.report.theme import Theme, new_figure
from mfd_fast.streams import make_generator
from mfd_fast.types import VelocityField

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STARTS = {"narrow": (-2.0, 0.2), "right": (-2.0, STD), "wide": (-2.0, 1.5)}
WIDTHS = (0.1, 0.2, 0.4, 0.55, 0.65, 0.8, 1.2, 2.0)
STAGES = ("early", "late")


@dataclass(frozen=True)
class JacobianSettings:
    """Sizes of the experiment."""

    updates: int = 3000
    learning_rate: float = 0.05
    rows: int = 256
    cosine_rows: int = 4096
    teacher_updates: int = 800
    student_updates: tuple[int, int] = (50, 400)
    """At the two stages of the networks."""
    step_size: float = 0.05


def both_gradients(
    teacher: VelocityField, auxiliary: VelocityField, x_t: Tensor, t: Tensor, r: Tensor, step_size: float
) -> tuple[Tensor, Tensor]:
    """Of ``1/2 |u_A - u_T|^2`` with respect to x_t, ``[B, ...]``: through both rollouts, and MFD's ``u_T - u_A``."""
    x_t = x_t.detach().requires_grad_(True)
    u_teacher, u_auxiliary = (
        mean_velocity(field, x_t, t, r, step_size=step_size, differentiable=True) for field in (teacher, auxiliary)
    )
    (full,) = torch.autograd.grad(0.5 * (u_auxiliary - u_teacher).square().sum(), x_t)
    return full, (u_teacher - u_auxiliary).detach()


def compare(full: Tensor, omitted: Tensor) -> Result:
    """Cosines per row, their quantiles and the share below zero; rms norms."""
    cosines = cosine_similarity(full.flatten(1).double(), omitted.flatten(1).double())
    levels = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    return {
        "cosine_mean": cosines.mean().item(),
        "cosine_quantiles": cosines.quantile(levels).tolist(),
        "share_against": (cosines < 0).double().mean().item(),
        "norm_full": full.flatten(1).norm(dim=1).square().mean().sqrt().item(),
        "norm_omitted": omitted.flatten(1).norm(dim=1).square().mean().sqrt().item(),
    }


def full_gap(points: Points, a: float, b: float) -> Tensor:
    """The full gradient with respect to x_t, from exact mean velocities: ``(c_T - c_A) (u_T - u_A)``."""
    auxiliary = slope(max(abs(b), 1e-6), points.t, points.r)
    return (slope(STD, points.t, points.r) - auxiliary)[:, None] * exact_gap(points, a, b)


def exact_full_gradient(a: float, b: float) -> tuple[float, float]:
    """The expectations of the module, over intervals with uniform ends."""
    t, r = interval_grid()
    teacher = slope(STD, t, r)
    difference = slope(max(abs(b), 1e-6), t, r) - teacher
    of_a = -((1 - t) * difference * (1 + (1 - t) * teacher)).mean().item() * (a - MEAN)
    return of_a, ((1 - t) * difference).square().mean().item() * b


def run(settings: JacobianSettings, cell: str, work: Work) -> Result:
    """See the module."""
    generator = make_generator(work.seed, f"jacobian/{cell}")
    if cell == "cosine":
        return {"widths": list(WIDTHS), "compared": [toy(settings, width, generator) for width in WIDTHS]}
    if cell == "network":
        return {stage: network(settings, stage, work) for stage in STAGES}
    budget = (settings.updates, settings.learning_rate, settings.rows)
    return courses(exact_full_gradient, full_gap, STARTS[cell], *budget, generator)


def toy(settings: JacobianSettings, width: float, generator: torch.Generator) -> Result:
    """The comparison for a student (-2, width), and how far the full gradient is from its closed form."""
    points = draw_points(-2.0, width, settings.cosine_rows, generator)
    # Rollouts of many small steps: the closed form is that of exact mean velocities.
    full, omitted = both_gradients(TEACHER, Gaussian(-2.0, width), points.x_t, points.t, points.r, 0.005)
    exact = full_gap(points, -2.0, width)
    return compare(full, omitted) | {"error": ((full - exact).norm() / exact.norm()).item()}


def network(settings: JacobianSettings, stage: str, work: Work) -> Result:
    """The comparison for a trained teacher and auxiliary on samples of their student."""
    updates = settings.student_updates[STAGES.index(stage)]
    chosen = points_settings(work.seed, settings.teacher_updates, updates, settings.step_size)
    student, teacher, auxiliary = snapshot(distilled(chosen, work.folder / stage, work.folder / "teacher"))
    x_t, t, r = probe(student, settings.cosine_rows, work.seed, "jacobian/network")
    return compare(*both_gradients(teacher, auxiliary, x_t, t, r, settings.step_size))


def figure(results: Results, theme: Theme) -> "Figure":
    """Cosines over the student's width, the courses of the mean, the cosines of networks."""
    drawing, (left, middle, right) = new_figure(12.0, 3.2, 3)
    cosine = results["cosine"][0]
    left.plot(cosine["widths"], [found["cosine_mean"] for found in cosine["compared"]], "o-", color=theme.student)
    left.axvline(STD, color=theme.data, linestyle=":")
    left.set(xlabel="width of the student (dotted: of the data)", ylabel="cosine of the two gradients")
    logarithmic(left, "x")
    for name, colour in zip(STARTS, (theme.student, theme.data, theme.teacher), strict=True):
        middle.plot(results[name][0]["exact"]["a"], color=colour, label=name)
        middle.plot(results[name][0]["sampled"]["a"], "--", color=colour, linewidth=1)
    middle.axhline(MEAN, color=theme.muted, linestyle=":")
    middle.set(ylabel="mean a of the student", xlabel="updates (thinned; dashed: batches)")
    logarithmic(middle, "y", "symlog")
    middle.legend()
    stages = results["network"][0]
    right.violinplot([stages[stage]["cosine_quantiles"] for stage in STAGES], showextrema=False, showmedians=True)
    right.set_xticks([1, 2], STAGES)
    right.set_ylabel("cosine per sample, networks")
    return drawing


def finding(results: Results) -> str:
    """Signs, ends of the descents, cosines of the networks."""
    cosine = results["cosine"][0]
    listed = ", ".join(
        f"{found['cosine_mean']:.3f} at {width:g}"
        for width, found in zip(cosine["widths"], cosine["compared"], strict=True)
    )
    error = max(found["error"] for found in cosine["compared"])
    text = (
        f"Affine student, data of width {STD}: mean cosine of the full gradient and MFD's by the student's width: "
        f"{listed}; rollouts depart from the closed form by at most {100 * error:.2g} %."
    )
    for name, start in STARTS.items():
        runs = results[name]
        exact = runs[0]["exact"]
        ends = [spread_words([run["sampled"]["a"][-1] for run in runs])]
        ends.append(spread_words([abs(run["sampled"]["b"][-1]) for run in runs]))
        text += (
            f" Full gradient from {start}: ends at ({exact['a'][-1]:.3g}, {exact['b'][-1]:.3g}) by its expectation and "
            f"at ({ends[0]}, {ends[1]}) by batches (width without its sign); the data are ({MEAN}, {STD})."
        )
    for stage in STAGES:
        found = [run[stage] for run in results["network"]]
        against = spread_words([100 * run["share_against"] for run in found])
        ratio = spread_words([run["norm_full"] / run["norm_omitted"] for run in found])
        mean = spread_words([run["cosine_mean"] for run in found])
        text += f" Networks, {stage}: mean cosine {mean}, {against} % of the samples against, norm {ratio} times MFD's."
    return text


JACOBIAN = Experiment(
    summary="the gradient with the Jacobian turns round for a narrow student; cosines for networks",
    quick=JacobianSettings(
        updates=1000, learning_rate=0.15, cosine_rows=1024, teacher_updates=300, student_updates=(10, 60)
    ),
    full=JacobianSettings(),
    cells=lambda settings: ("cosine", *STARTS, "network"),
    run=run,
    figure=figure,
    finding=finding,
)
