"""Vector field: the student's gradient field with a noisy auxiliary, VSD (one evaluation) beside MFD (K of them).

Teacher and student are mixtures of Gaussians whose velocities are exact, so that the noise is all that is wrong.
Every evaluation of the auxiliary gets independent normal noise; the fields, at the same points of a grid, are

    vsd: v_T(x, t) - v_A(x, t)            mfd: u_T(x, t, r) - u_A(x, t, r), K Euler steps

Two conventions of equal noise: ``each``, the same standard deviation s in every evaluation; ``total``, the variances of
all evaluations of a draw add up to s^2, that is s / sqrt(K) in each of MFD's. Averages of K draws of VSD cost as many
evaluations as one of MFD. What is measured, each field against its own without noise:

* ``cosine``: mean cosine over the points;
* ``roughness``: rms difference of neighbours on the grid over rms length, sqrt(2) for noise alone;
* ``noise``: rms noise of a component.

For noise of standard deviation s in each of the two components of a vector of length m, ``q = (m / 2 s)^2``, the mean
cosine is ``sqrt(pi q / 2) exp(-q) (I_0(q) + I_1(q))``: the expectation that stands beside VSD's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mfd_fast.closed_forms import GaussianMixture
from mfd_fast.experiments.base import Experiment, Result, Results, Work, spread_words
from mfd_fast.mean_velocity import mean_velocity
from mfd_fast.report.theme import Theme, new_figure
from mfd_fast.streams import make_generator
from mfd_fast.types import VelocityField

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T, R = 0.7, 0.1
HALF_SIDE = 2.0
"""The grid is the square from -HALF_SIDE to HALF_SIDE."""
CELLS = ("each", "total")
KINDS = ("vsd", "vsd-averaged", "mfd")
TITLES = {"vsd": "VSD, one draw", "vsd-averaged": "VSD, mean of K draws", "mfd": "MFD, one draw"}


@dataclass(frozen=True)
class VectorFieldSettings:
    """Sizes of the experiment."""

    side: int = 25
    """Points of a side of the grid on which is measured."""
    shown: int = 13
    """Points of a side of the picture; (side - 1) is a multiple of (shown - 1)."""
    steps: int = 20
    """K."""
    noise: float = 2.0
    """s: of the order of the field itself."""
    draws: int = 50


def ring(count: int, radius: float, std: float, turn: float = 0.0) -> GaussianMixture:
    """Equal Gaussians on a circle; ``turn`` in radians."""
    angles = [2 * math.pi * index / count + turn for index in range(count)]
    return GaussianMixture([1.0] * count, [[radius * math.cos(a), radius * math.sin(a)] for a in angles], std)


TEACHER = ring(8, 2.0, 0.2)
STUDENT = ring(8, 1.5, 0.3, math.pi / 8)
"""A student between the modes of its teacher, too near the middle and too wide."""


def grid(side: int) -> Tensor:
    """``[side^2, 2]`` float64, row by row."""
    line = torch.linspace(-HALF_SIDE, HALF_SIDE, side, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


def gap_field(kind: str, x: Tensor, steps: int, auxiliary: VelocityField) -> Tensor:
    """What MFD or VSD makes of an auxiliary at the points ``x`` ``[n, 2]``."""
    if kind != "mfd":
        t = x.new_full((len(x),), T)
        return TEACHER(x, t) - auxiliary(x, t)
    gap: Tensor = mean_velocity(TEACHER, x, T, R, steps=steps) - mean_velocity(auxiliary, x, T, R, steps=steps)
    return gap


def noisy(std: float, generator: torch.Generator) -> VelocityField:
    """The exact auxiliary of the student with independent noise in every evaluation."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        return STUDENT(x, t) + std * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    return field


def roughness(field: Tensor) -> float:
    """rms difference of direct neighbours of a field ``[side^2, 2]`` over its rms length."""
    side = math.isqrt(len(field))
    square = field.view(side, side, -1)
    steps = [part.square().sum(-1).mean() for part in (square[1:] - square[:-1], square[:, 1:] - square[:, :-1])]
    return float((torch.stack(steps).mean() / square.square().sum(-1).mean()).sqrt())


def expected_cosine(exact: Tensor, std: float) -> float:
    """The mean over the points of the expected cosine of ``exact`` ``[n, 2]`` and itself with noise added."""
    q = exact.square().sum(1) / (4 * std**2)
    return float(((math.pi * q / 2).sqrt() * (torch.special.i0e(q) + torch.special.i1e(q))).mean())


def measure(exact: Tensor, draw: Callable[[], Tensor], draws: int) -> Result:
    """Means over draws of a field; the noise is their rms distance from ``exact``."""
    cosines, rough, power = 0.0, 0.0, 0.0
    for _ in range(draws):
        field = draw()
        cosines += cosine_similarity(field, exact).mean().item()
        rough += roughness(field)
        power += (field - exact).square().mean().item()
    return {"cosine": cosines / draws, "roughness": rough / draws, "noise": math.sqrt(power / draws)}


def run(settings: VectorFieldSettings, cell: str, work: Work) -> Result:
    """The three fields under one convention, and of the first seed the picture."""
    generator, x = make_generator(work.seed, f"vector-field/{cell}"), grid(settings.side)
    steps, every = settings.steps, (settings.side - 1) // (settings.shown - 1)
    of_mfd = settings.noise if cell == "each" else settings.noise / math.sqrt(steps)
    found: Result = {}
    for kind in KINDS:
        auxiliary = noisy(of_mfd if kind == "mfd" else settings.noise, generator)
        exact = gap_field(kind, x, steps, STUDENT)
        count = steps if kind == "vsd-averaged" else 1

        def draw(kind: str = kind, auxiliary: VelocityField = auxiliary, count: int = count) -> Tensor:
            return torch.stack([gap_field(kind, x, steps, auxiliary) for _ in range(count)]).mean(0)

        found[kind] = measure(exact, draw, settings.draws) | {
            "length": exact.square().sum(1).mean().sqrt().item(),
            "roughness_exact": roughness(exact),
            "evaluations": steps if kind == "mfd" else count,
        }
        if kind != "mfd":
            found[kind]["expected_cosine"] = expected_cosine(exact, settings.noise / math.sqrt(count))
        if work.seed == 0 and (cell == CELLS[0] or kind == "mfd"):
            shown_fields = {"exact": exact, "draw": draw()}
            found[kind]["picture"] = {name: _picture(field, every) for name, field in shown_fields.items()}
    return found


def _picture(field: Tensor, every: int) -> list[float]:
    """Every so-manieth vector, ``[shown^2 * 2]``, over the mean length of all."""
    side = math.isqrt(len(field))
    square = field.view(side, side, 2)[::every, ::every] / field.norm(dim=1).mean()
    return [round(value, 3) for value in square.flatten().tolist()]


def figure(results: Results, theme: Theme) -> "Figure":
    """Descent directions without noise and of one draw, every field over its mean length."""
    panels = [("each", "vsd", "exact"), *(("each", kind, "draw") for kind in KINDS), ("total", "mfd", "draw")]
    panels.insert(3, ("each", "mfd", "exact"))
    drawing, axes = new_figure(15.0, 2.9, len(panels))
    for axis, (cell, kind, name) in zip(axes, panels, strict=True):
        vectors = -torch.tensor(results[cell][0][kind]["picture"][name]).view(-1, 2)
        x = grid(math.isqrt(len(vectors)))
        colour = theme.student if kind == "mfd" else theme.teacher
        axis.quiver(*x.unbind(1), *vectors.unbind(1), color=colour, angles="xy", scale_units="xy", scale=6, width=0.006)
        axis.plot(*STUDENT.means.unbind(1), "o", color=theme.muted, markersize=4)
        axis.plot(*TEACHER.means.unbind(1), "*", color=theme.data, markersize=7)
        title = f"{kind.upper()[:3]} without noise" if name == "exact" else TITLES[kind]
        axis.set(title=title + (", s / sqrt K" if cell == "total" else ""), xticks=[], yticks=[], aspect="equal")
        axis.grid(visible=False)
    return drawing


def finding(results: Results) -> str:
    """Cosines, roughness and noise of each field under both conventions."""
    text = ""
    words = {"each": "The same noise in every evaluation", "total": "The same sum of variances"}
    for cell in CELLS:
        parts = []
        for kind in KINDS:
            runs = [run[kind] for run in results[cell]]
            of = {key: spread_words([run[key] for run in runs]) for key in ("cosine", "roughness", "noise")}
            expected = f" (expected {runs[0]['expected_cosine']:.3f})" if "expected_cosine" in runs[0] else ""
            parts.append(
                f"{TITLES[kind]} ({runs[0]['evaluations']} evaluations): cosine with the field without noise "
                f"{of['cosine']}{expected}, roughness {of['roughness']} (without noise "
                f"{runs[0]['roughness_exact']:.2f}), noise {of['noise']} on a field of length {runs[0]['length']:.2f}"
            )
        text += f"{words[cell]}: {'; '.join(parts)}. "
    each = results["each"][0]
    return text + (
        f"For as many evaluations, MFD has {each['mfd']['noise'] / each['vsd-averaged']['noise']:.2f} of the noise of "
        f"averaged VSD: the smoothing is that of averaging."
    )


VECTOR_FIELD = Experiment(
    summary="gradient fields of VSD and MFD with a noisy auxiliary: pictures, cosines and roughness",
    quick=VectorFieldSettings(draws=20),
    full=VectorFieldSettings(),
    cells=lambda settings: CELLS,
    run=run,
    figure=figure,
    finding=finding,
)
