"""Measured order of convergence of every solver."""

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from mfd_fast import mean_velocity
from mfd_fast.closed_forms import Gaussian, GaussianMixture
from mfd_fast.solvers import SOLVERS

LAW = Gaussian([1.3, -0.4], [0.6, 1.7])
MIXTURE = GaussianMixture([0.5, 0.3, 0.2], [[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], [0.5, 0.8, 0.6])
DIRECTIONS = [pytest.param(0.9, 0.15, id="to-data"), pytest.param(0.15, 0.9, id="to-noise")]


def _points() -> Tensor:
    return 1.5 * torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _fine_rk4(field: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: float, r: float, steps: int) -> Tensor:
    """A plain loop of the classical method."""
    h, y = (r - t) / steps, x
    for step in range(steps):
        now = torch.full((len(x),), t + step * h, dtype=x.dtype)
        a = field(y, now)
        b = field(y + h / 2 * a, now + h / 2)
        c = field(y + h / 2 * b, now + h / 2)
        y = y + h / 6 * (a + 2 * b + 2 * c + field(y + h * c, now + h))
    return (y - x) / (r - t)


@cache
def _on_mixture(t: float, r: float) -> Tensor:
    return _fine_rk4(MIXTURE, _points(), t, r, 400)


def _measured_order(
    name: str, field: Callable[[Tensor, Tensor], Tensor], exact: Tensor, t: float, r: float, steps: int
) -> float:
    errors = [
        float((mean_velocity(field, _points(), t, r, solver=name, steps=n) - exact).norm()) for n in (steps, 2 * steps)
    ]
    assert errors[1] > 1e-12, "rounding would hide the order"
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(("t", "r"), DIRECTIONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_order_on_the_gaussian_flow_map(name: str, t: float, r: float) -> None:
    start, end = (torch.tensor([time], dtype=torch.float64) for time in (t, r))
    exact = LAW.mean_velocity(_points(), start, end)
    # At least: on a Gaussian the error of the midpoint method happens to be of third order.
    assert _measured_order(name, LAW, exact, t, r, 64) > SOLVERS[name].order - 0.15


@pytest.mark.parametrize(("t", "r"), DIRECTIONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_order_on_a_mixture(name: str, t: float, r: float) -> None:
    exact = _on_mixture(t, r)
    assert _measured_order(name, MIXTURE, exact, t, r, 48) == pytest.approx(SOLVERS[name].order, abs=0.25)


@pytest.mark.parametrize("name", SOLVERS)
def test_polynomials_in_time_up_to_the_order_are_exact(name: str) -> None:
    degree = SOLVERS[name].order - 1
    x = torch.zeros(2, 3, dtype=torch.float64)

    def field(x: Tensor, t: Tensor) -> Tensor:
        return (t**degree)[:, None].expand_as(x)

    exact = (1 - 0.25 ** (degree + 1)) / (degree + 1) / 0.75
    found = mean_velocity(field, x, 1.0, 0.25, solver=name, steps=3)
    torch.testing.assert_close(found, torch.full_like(x, exact), rtol=1e-14, atol=0)
