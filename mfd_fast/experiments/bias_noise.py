"""Bias and noise of the auxiliary apart: where the affine student ends, with MFD and with VSD (r = t).

Every evaluation of the exact auxiliary gets a constant (the bias) and independent noise added. A bias ``v`` changes
u_A by ``v g(t, r)``, ``g = mean over the interval of sigma_r / sigma_q``, so that the student's mean settles at

    a - mean = v E[(1-t) g] / E[(1-t) (1 + (1-t) c_T)]

with ``g = 1`` and ``kappa`` in place of ``c_T`` for VSD. Noise moves no fixed point: it makes the student wander.
Cells: ``mfd``, ``vsd``; each a table over biases and noises.
"""

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mfd_fast.closed_forms import Gaussian
from mfd_fast.experiments.affine import MEAN, STD, TEACHER, interval_grid, slope
from mfd_fast.experiments.base import Experiment, Result, Results, Work, spread_words
from mfd_fast.mean_velocity import mean_velocity_pair
from mfd_fast.path import interpolate
from mfd_fast.report.theme import Theme, new_figure
from mfd_fast.streams import make_generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELLS = ("mfd", "vsd")


@dataclass(frozen=True)
class BiasNoiseSettings:
    """Sizes of the experiment."""

    biases: tuple[float, ...] = (0.0, 0.2, 0.4)
    noises: tuple[float, ...] = (0.0, 2.0, 4.0)
    updates: int = 300
    learning_rate: float = 0.2
    rows: int = 32
    students: int = 64
    """That descend beside each other."""
    step_size: float = 0.03


def expected_shift(cell: str, bias: float) -> float:
    """``a - mean`` at rest for this bias, over intervals with uniform ends."""
    t, r = interval_grid()
    end = r if cell == "mfd" else t
    shares = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    between = end + (t - end) * shares[:, None]
    gain = (torch.hypot((1 - end) * STD, end) / torch.hypot((1 - between) * STD, between)).mean(0)
    pull = (1 - t) * (1 + (1 - t) * slope(STD, t, end))
    return bias * ((1 - t) * gain).mean().item() / pull.mean().item()


def wander(settings: BiasNoiseSettings, cell: str, bias: float, noise: float, seed: int) -> Result:
    """Mean and standard deviation of a and b over students that began at the data's law and the second half of their
    descents. Every student is a dimension of one batch; the intervals of a row are those of all.
    """
    generator = make_generator(seed, f"bias-noise/{bias}/{noise}")
    shape = (settings.rows, settings.students)
    a, b = (torch.full((settings.students,), value, dtype=torch.float64) for value in (MEAN, STD))

    def auxiliary(x: Tensor, t: Tensor) -> Tensor:
        exact: Tensor = Gaussian(a, b.abs().clamp_min(1e-6))(x, t)
        return exact + bias + noise * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    courses: list[Tensor] = []
    for _ in range(settings.updates):
        z, path_noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind(0)
        ends = torch.rand(2, settings.rows, generator=generator, dtype=torch.float64)
        t = ends.amax(0)
        r = ends.amin(0) if cell == "mfd" else t
        x_t = interpolate(a + b * z, path_noise, t)
        teacher_u, auxiliary_u = mean_velocity_pair(TEACHER, auxiliary, x_t, t, r, step_size=settings.step_size)
        pulled = (1 - t)[:, None] * (teacher_u - auxiliary_u)
        a = a - settings.learning_rate * pulled.mean(0)
        b = b - settings.learning_rate * (pulled * z).mean(0)
        courses.append(torch.stack([a, b]))
    of_a, of_b = torch.stack(courses[len(courses) // 2 :]).unbind(1)
    widths = {"width": of_b.mean().item(), "width_wander": of_b.std().item()}
    return {"bias": bias, "noise": noise, "shift": of_a.mean().item() - MEAN, "wander": of_a.std().item(), **widths}


def run(settings: BiasNoiseSettings, cell: str, work: Work) -> Result:
    """Biases without noise, noises without bias, and the largest of both."""
    pairs = [(bias, 0.0) for bias in settings.biases] + [(0.0, noise) for noise in settings.noises if noise]
    pairs.append((settings.biases[-1], settings.noises[-1]))
    found = [wander(settings, cell, bias, noise, work.seed) for bias, noise in pairs]
    return {"found": [row | {"expected_shift": expected_shift(cell, row["bias"])} for row in found]}


def figure(results: Results, theme: Theme) -> "Figure":
    """The shift over the bias, the wandering over the noise."""
    drawing, (left, right) = new_figure(9.0, 3.2, 2)
    for cell, colour in zip(CELLS, (theme.student, theme.teacher), strict=True):
        rows = results[cell][0]["found"]
        still = [row for row in rows if not row["noise"]]
        left.plot([row["bias"] for row in still], [row["expected_shift"] for row in still], color=colour, label=cell)
        left.plot([row["bias"] for row in still], [row["shift"] for row in still], "o", color=colour)
        fair = [row for row in rows if not row["bias"]]
        right.plot([row["noise"] for row in fair], [row["wander"] for row in fair], "o-", color=colour, label=cell)
    left.set(xlabel="bias of the auxiliary", ylabel="shift of the student's mean")
    right.set(xlabel="noise of an evaluation", ylabel="wandering of the student's mean")
    left.legend()
    return drawing


def finding(results: Results) -> str:
    """Shift and wandering of both methods at the largest bias and noise, and their ratios."""
    parts, ratios = [], []
    for cell in CELLS:
        tables = [run["found"] for run in results[cell]]
        biased = [max((row for row in rows if not row["noise"]), key=lambda row: row["bias"]) for rows in tables]
        noisy = [max((row for row in rows if not row["bias"]), key=lambda row: row["noise"]) for rows in tables]
        ratios.append(
            (statistics.fmean(row["shift"] for row in biased), statistics.fmean(row["wander"] for row in noisy))
        )
        parts.append(
            f"{cell}: a bias of {biased[0]['bias']:g} shifts the student's mean by "
            f"{spread_words([row['shift'] for row in biased])} (closed form of small steps "
            f"{biased[0]['expected_shift']:.3g}); noise of {noisy[0]['noise']:g} an evaluation shifts it by "
            f"{spread_words([row['shift'] for row in noisy])} and lets it wander by "
            f"{spread_words([row['wander'] for row in noisy])}"
        )
    (mfd_shift, mfd_wander), (vsd_shift, vsd_wander) = ratios
    return (
        f"{'; '.join(parts)}. MFD over VSD: {mfd_wander / vsd_wander:.2f} of the wandering by noise, "
        f"{mfd_shift / vsd_shift:.2f} of the shift by bias."
    )


BIAS_NOISE = Experiment(
    summary="a constant error of the auxiliary shifts the student, noise makes it wander: MFD and VSD",
    quick=BiasNoiseSettings((0.0, 0.2, 0.4), (0.0, 2.0, 4.0), updates=150, rows=32, students=32, step_size=0.05),
    full=BiasNoiseSettings(),
    cells=lambda settings: CELLS,
    run=run,
    figure=figure,
    finding=finding,
)
