"""Variance: what averaging over K evaluations does to noise, and the loss per sample of MFD and VSD.

Cell ``law``: Gaussian data, independent noise of standard deviation s in every evaluation. With steps ``d = (t-r)/K``

    Var u_K = s^2 sum_i prod_{j>i} (1 - d kappa(t_j))^2 / K^2,

that is ``s^2/K`` times a factor of order one. The student's gradient is ``(1-t)`` times u, so its variance follows.
Cells ``early`` and ``late``: a frozen student, its auxiliary and its teacher on the eight Gaussians after some and all
updates; the loss per sample ``mean(sg[u_T - u_A] x_t)`` at the same points, for MFD and with r = t for VSD.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfd_fast.closed_forms import Gaussian
from mfd_fast.experiments.affine import STD
from mfd_fast.experiments.base import Experiment, Result, Results, Work, spread_words
from mfd_fast.experiments.drawing import logarithmic
from mfd_fast.experiments.points import distilled, points_settings, probe, snapshot
from mfd_fast.mean_velocity import mean_velocity, mean_velocity_pair
from mfd_fast.report.theme import Theme, new_figure
from mfd_fast.streams import make_generator, standard_normal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T, R = 0.8, 0.2
METHODS = ("mfd", "vsd")


@dataclass(frozen=True)
class VarianceSettings:
    """Sizes of the experiment."""

    rows: int = 400_000
    """Rows of the law; the error of its variances is about sqrt(2 / rows)."""
    steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    teacher_updates: int = 800
    early_updates: int = 50
    student_updates: int = 400
    samples: int = 8192
    step_size: float = 0.03


def exact_variance(std: float, t: float, r: float, steps: int) -> float:
    """``Var u_K`` for noise of variance 1 in each evaluation, data of width ``std``."""
    step = (t - r) / steps
    after, total = 1.0, 0.0
    for index in reversed(range(steps)):
        total += after
        time = t - index * step
        kappa = (time - (1 - time) * std**2) / ((1 - time) ** 2 * std**2 + time**2)
        after *= (1 - step * kappa) ** 2
    return total / steps**2


def measured_variance(steps: int, rows: int, generator: torch.Generator) -> float:
    """The variance of the package's mean velocity of a field with noise of variance 1 in every evaluation."""
    law = Gaussian(0.0, STD)

    def noisy(x: Tensor, t: Tensor) -> Tensor:
        return law(x, t) + standard_normal(tuple(x.shape), generator)

    velocity: Tensor = mean_velocity(noisy, torch.ones(rows, 1), T, R, steps=steps)
    return velocity.double().var().item()


def run(settings: VarianceSettings, cell: str, work: Work) -> Result:
    """See the module."""
    if cell == "law":
        generator = make_generator(work.seed, "variance/law")
        measured = [measured_variance(steps, settings.rows, generator) for steps in settings.steps]
        exact = [exact_variance(STD, T, R, steps) for steps in settings.steps]
        return {"steps": list(settings.steps), "measured": measured, "exact": exact}
    return losses(settings, cell, work)


def losses(settings: VarianceSettings, cell: str, work: Work) -> Result:
    """Quantiles of the loss per sample and moments of the gradient with respect to a sample, by method."""
    updates = settings.early_updates if cell == "early" else settings.student_updates
    chosen = points_settings(work.seed, settings.teacher_updates, updates, settings.step_size)
    student, teacher, auxiliary = snapshot(distilled(chosen, work.folder / cell, work.folder / "teacher"))
    x_t, t, r = probe(student, settings.samples, work.seed, "variance/losses")
    found = {}
    for name, end in (("mfd", r), ("vsd", t)):
        teacher_u, auxiliary_u = mean_velocity_pair(teacher, auxiliary, x_t, t, end, step_size=settings.step_size)
        gap = (teacher_u - auxiliary_u).double()
        loss = (gap * x_t).mean(1)
        gradient = (1 - t)[:, None] * gap
        levels = torch.linspace(0.005, 0.995, 100, dtype=torch.float64)
        found[name] = {
            "loss_quantiles": loss.quantile(levels).tolist(),
            "loss_std": loss.std().item(),
            "gradient_variance": gradient.var(0).sum().item(),
            "gradient_mean_norm": gradient.mean(0).norm().item(),
            "gap": gap.square().mean().sqrt().item(),
        }
    return found


def figure(results: Results, theme: Theme) -> "Figure":
    """The law beside its measurement; a violin for each method and stage."""
    drawing, (left, right) = new_figure(9.0, 3.4, 2)
    law = results["law"][0]
    left.plot(law["steps"], law["exact"], color=theme.data, label="closed form")
    left.plot(law["steps"], law["measured"], "o", color=theme.student, label="measured")
    left.set(xlabel="evaluations K", ylabel="variance of u / of the noise")
    logarithmic(left, "xy")
    left.legend()
    names = [(cell, method) for cell in ("early", "late") for method in METHODS]
    values = [results[cell][0][method]["loss_quantiles"] for cell, method in names]
    parts = right.violinplot(values, showextrema=False, showmedians=True)
    bodies: Any = parts["bodies"]
    for body, (_, method) in zip(bodies, names, strict=True):
        body.set(facecolor=theme.student if method == "mfd" else theme.teacher, alpha=0.6)
    right.set_xticks(range(1, 5), [f"{method}\n{cell}" for cell, method in names])
    right.set_ylabel("loss of a sample (99 % of them)")
    return drawing


def finding(results: Results) -> str:
    """The largest departure from the law, and the ratios of MFD to VSD."""
    worst = max(
        abs(measured / exact - 1)
        for law in results["law"]
        for measured, exact in zip(law["measured"], law["exact"], strict=True)
    )
    law = results["law"][0]
    factors = ", ".join(f"{k * value:.3f} at K={k}" for k, value in zip(law["steps"], law["exact"], strict=True))
    text = (
        f"Independent noise: the variance of the mean velocity over K evaluations is the closed form within "
        f"{100 * worst:.2g} %; K times it is {factors}."
    )
    for cell in ("early", "late"):
        ratios = {
            key: [run["mfd"][key] / run["vsd"][key] for run in results[cell]]
            for key in ("loss_std", "gradient_variance", "gap")
        }
        text += (
            f" Mixture, {cell}: MFD over VSD, spread of the loss per sample {spread_words(ratios['loss_std'])}, "
            f"variance of the gradient {spread_words(ratios['gradient_variance'])} "
            f"(standard deviation {math.sqrt(ratios['gradient_variance'][0]):.2f}), rms gap of the fields "
            f"{spread_words(ratios['gap'])}."
        )
    return text


VARIANCE = Experiment(
    summary="noise of u falls as 1/K with its exact factor; loss per sample of MFD and VSD with a frozen student",
    quick=VarianceSettings(rows=100_000, teacher_updates=300, early_updates=10, student_updates=60, samples=4096),
    full=VarianceSettings(),
    cells=lambda settings: ("law", "early", "late"),
    run=run,
    figure=figure,
    finding=finding,
)
