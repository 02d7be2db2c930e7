"""The toy of the closed forms: data ``N(MEAN, STD^2)`` and a student ``a + b z``, whose law and auxiliary are exact."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast.closed_forms import Gaussian
from mfd_fast.experiments.base import Result
from mfd_fast.path import interpolate

MEAN, STD = 1.3, 0.6
TEACHER = Gaussian(MEAN, STD)
CLAMP = 1.0
"""Largest size of each gradient in a descent."""


class Points(NamedTuple):
    """Samples of the student and points of their paths, ``[B, 1]`` float64; the times ``[B]``."""

    z: Tensor
    data: Tensor
    noise: Tensor
    x_t: Tensor
    t: Tensor
    r: Tensor


Gap = Callable[[Points, float, float], Tensor]
"""The gradient with respect to x_t ``[B, 1]`` for a student (a, b); u_T - u_A for Mean Flow Distillation."""
Gradient = Callable[[float, float], tuple[float, float]]
"""The gradients of (a, b) at (a, b)."""


def draw_points(a: float, b: float, rows: int, generator: torch.Generator) -> Points:
    """Samples of the student (a, b), path noise and intervals with uniform ends."""
    z, noise = torch.randn(2, rows, 1, generator=generator, dtype=torch.float64).unbind(0)
    ends = torch.rand(2, rows, generator=generator, dtype=torch.float64)
    t, r = ends.amax(0), ends.amin(0)
    data = a + b * z
    return Points(z, data, noise, interpolate(data, noise, t), t, r)


def exact_gap(points: Points, a: float, b: float) -> Tensor:
    """``u_T - u_A`` with the exact mean velocities; a student of no width has an auxiliary of width 1e-6."""
    auxiliary = Gaussian(a, max(abs(b), 1e-6))
    where = (points.x_t, points.t, points.r)
    return TEACHER.mean_velocity(*where) - auxiliary.mean_velocity(*where)


def slope(std: float, t: Tensor, r: Tensor) -> Tensor:
    """``c(t, r)`` in ``u = -mean + c (x - (1-t) mean)``, for data of this width."""
    sigma_t, sigma_r = (torch.hypot((1 - time) * std, time) for time in (t, r))
    return (t + r - std**2 * (2 - t - r)) / (sigma_t * (sigma_t + sigma_r))


def interval_grid(side: int = 40) -> tuple[Tensor, Tensor]:
    """Intervals that stand for those with uniform ends: midpoints of a grid, ``[side^2]`` each, float64."""
    ends = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    first, second = torch.cartesian_prod(ends, ends).unbind(1)
    return torch.maximum(first, second), torch.minimum(first, second)


def descend(
    gradient: Gradient,
    start: tuple[float, float],
    updates: int,
    learning_rate: float,
) -> tuple[list[float], list[float]]:
    """The course of (a, b) under gradient descent with clamped gradients, the start included."""
    a, b = start
    course: tuple[list[float], list[float]] = ([a], [b])
    for _ in range(updates):
        slopes = (min(CLAMP, max(-CLAMP, value)) for value in gradient(a, b))
        a, b = (value - learning_rate * slope for value, slope in zip((a, b), slopes, strict=True))
        course[0].append(a)
        course[1].append(b)
    return course


def sampled_gradient(gap: Gap, rows: int, generator: torch.Generator) -> Gradient:
    """Gradients of (a, b) from a batch of the student's samples: ``mean (1-t) gap dG/d(a, b)``."""

    def gradient(a: float, b: float) -> tuple[float, float]:
        points = draw_points(a, b, rows, generator)
        pulled = (1 - points.t)[:, None] * gap(points, a, b)
        return pulled.mean().item(), (pulled * points.z).mean().item()

    return gradient


def courses(
    exact: Gradient,
    gap: Gap,
    start: tuple[float, float],
    updates: int,
    learning_rate: float,
    rows: int,
    generator: torch.Generator,
) -> Result:
    """The courses of ``a`` and ``b``, thinned: ``exact`` by these gradients, ``sampled`` by those of batches."""
    gradients = {"exact": exact, "sampled": sampled_gradient(gap, rows, generator)}
    found = {kind: descend(gradient, start, updates, learning_rate) for kind, gradient in gradients.items()}
    return {kind: {"a": thinned(a), "b": thinned(b)} for kind, (a, b) in found.items()}


def thinned(values: list[float], most: int = 60) -> list[float]:
    """Every so-manieth value, for a file and a figure; the last is always there."""
    every = max(1, (len(values) - 1) // most)
    return [round(value, 6) for value in (*values[:-1][::every], values[-1])]
