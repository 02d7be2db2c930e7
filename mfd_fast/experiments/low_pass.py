"""Low pass: how a wave in time, added to the field, comes through into the mean velocity.

A wave ``sin(w q + phase)`` added to a field that does not depend on x changes u by the wave at the middle of the
interval times ``sinc(w (t-r) / 2)``, ``sinc x = sin x / x`` (appendix B.3 of arXiv 2606.11155). Two things change that:

* K Euler steps take K values of the wave: the gain is ``sin(K y) / (K sin y)`` with ``y = w d / 2``, ``d = (t-r) / K``,
  which comes back to 1 at ``w d = 2 pi``: a wave of the length of a step is not damped;
* a field that depends on x carries a change at time q on to r. For Gaussian data by the factor ``sigma_r / sigma_q``:
  the gain is ``|integral sigma_r / sigma_q exp(i w q) dq| / (t - r)``.

Cells: ``constant``, ``gaussian`` (many small steps), and ``euler`` (K = 10).
"""

import cmath
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mfd_fast.closed_forms import Gaussian
from mfd_fast.experiments.affine import STD
from mfd_fast.experiments.base import Experiment, Result, Results, Work
from mfd_fast.mean_velocity import mean_velocity
from mfd_fast.report.theme import Theme, new_figure
from mfd_fast.types import VelocityField

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T, R = 0.9, 0.1
FEW = 10
SIZE = 1e-3


@dataclass(frozen=True)
class LowPassSettings:
    """Sizes of the experiment."""

    frequencies: int = 120
    highest: float = 120.0
    """Of w, in radians for a unit of time."""
    steps: int = 2000
    """Of the cells that stand for the integral."""


def sinc(x: float) -> float:
    """``sin x / x``."""
    return math.sin(x) / x if x else 1.0


def euler_gain(frequency: float, steps: int) -> float:
    """The gain of K Euler steps over a constant field."""
    half = frequency * (T - R) / steps / 2
    return abs(sum(cmath.exp(2j * half * index) for index in range(steps))) / steps


def gaussian_gain(frequency: float, points: int = 20_000) -> float:
    """The gain for Gaussian data of width `STD`, by the midpoint rule."""

    def sigma(time: float) -> float:
        return math.hypot((1 - time) * STD, time)

    times = (R + (T - R) * (index + 0.5) / points for index in range(points))
    return abs(sum(sigma(R) / sigma(time) * cmath.exp(1j * frequency * time) for time in times)) / points


def measured_gain(field: VelocityField, frequency: float, steps: int) -> float:
    """The change of the package's mean velocity by a sine and by a cosine, as an amplitude."""
    x = torch.full((1, 1), 0.7, dtype=torch.float64)
    plain = mean_velocity(field, x, T, R, steps=steps)
    changes = []
    for phase in (0.0, math.pi / 2):

        def waved(x: Tensor, t: Tensor, phase: float = phase) -> Tensor:
            return field(x, t) + SIZE * (frequency * t + phase).sin()[:, None]

        changes.append((mean_velocity(waved, x, T, R, steps=steps) - plain).item() / SIZE)
    return math.hypot(*changes)


def expected_gain(cell: str, frequency: float) -> float:
    """The closed form of a cell."""
    if cell == "gaussian":
        return gaussian_gain(frequency)
    return euler_gain(frequency, FEW) if cell == "euler" else abs(sinc(frequency * (T - R) / 2))


def run(settings: LowPassSettings, cell: str, work: Work) -> Result:
    """Measured and expected gains over the frequencies."""
    field: VelocityField = Gaussian(0.0, STD) if cell == "gaussian" else lambda x, t: torch.ones_like(x)
    steps = FEW if cell == "euler" else settings.steps
    every = [settings.highest * (index + 1) / settings.frequencies for index in range(settings.frequencies)]
    return {
        "frequency": every,
        "measured": [measured_gain(field, w, steps) for w in every],
        "expected": [expected_gain(cell, w) for w in every],
        "sinc": [abs(sinc(w * (T - R) / 2)) for w in every],
    }


def figure(results: Results, theme: Theme) -> "Figure":
    """Gains over w (t - r) / 2 pi, the number of waves in the interval."""
    drawing, axes = new_figure(12.0, 3.0, 3)
    titles = {"constant": "constant field", "gaussian": "Gaussian data", "euler": f"constant field, {FEW} Euler steps"}
    for axis, (cell, title) in zip(axes, titles.items(), strict=True):
        found = results[cell][0]
        waves = [w * (T - R) / (2 * math.pi) for w in found["frequency"]]
        axis.plot(waves, found["expected"], color=theme.data, label="closed form")
        axis.plot(waves, found["measured"], ".", color=theme.student, label="measured")
        axis.plot(waves, found["sinc"], ":", color=theme.teacher, label="sinc")
        axis.set(xlabel="waves in the interval", ylabel="gain", title=title)
    axes[0].legend()
    return drawing


def finding(results: Results) -> str:
    """Largest departures, and how far the sinc is from the two other cells."""

    def apart(cell: str, one: str, other: str) -> float:
        found = results[cell][0]
        largest: float = max(abs(a - b) for a, b in zip(found[one], found[other], strict=True))
        return largest

    euler = results["euler"][0]
    back = 2 * math.pi * FEW / (T - R)
    nearest = min(range(len(euler["frequency"])), key=lambda index: abs(euler["frequency"][index] - back))
    return (
        f"Constant field: the gain is the sinc within {apart('constant', 'measured', 'sinc'):.1g}. Gaussian data: it "
        f"is the integral with sigma_r / sigma_q within {apart('gaussian', 'measured', 'expected'):.1g}, and "
        f"departs from the sinc by up to {apart('gaussian', 'measured', 'sinc'):.2f}. {FEW} Euler steps: it is "
        f"sin(K y) / (K sin y) within {apart('euler', 'measured', 'expected'):.1g}; near w = {back:.1f}, a wave a "
        f"step, the gain is {euler['measured'][nearest]:.2f} where the sinc has {euler['sinc'][nearest]:.3f}."
    )


LOW_PASS = Experiment(
    summary="a wave in the field comes through into u with the gain of a sinc; fixed steps let short waves back in",
    quick=LowPassSettings(frequencies=48, steps=400),
    full=LowPassSettings(),
    cells=lambda settings: ("constant", "gaussian", "euler"),
    run=run,
    figure=figure,
    finding=finding,
)
