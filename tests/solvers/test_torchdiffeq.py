"""Agreement with torchdiffeq, an independent implementation."""

import sys

import pytest
import torch
from torch import Tensor

from mfd_fast import integrate, mean_velocity
from mfd_fast.closed_forms import Gaussian, GaussianMixture
from mfd_fast.solvers.torchdiffeq import ADAPTIVE_METHODS, FIXED_METHODS

pytest.importorskip("torchdiffeq")

LAW = Gaussian([1.3, -0.4], [0.6, 1.7])
MIXTURE = GaussianMixture([0.5, 0.3, 0.2], [[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], [0.5, 0.8, 0.6])
T = torch.tensor([0.9, 0.2, 0.5, 0.7], dtype=torch.float64)
R = torch.tensor([0.1, 0.8, 0.5, 0.6], dtype=torch.float64)


def _points(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_adaptive_methods_find_the_flow_map(method: str) -> None:
    tolerance = 1e-8 if method in ("dopri5", "dopri8") else 1e-5
    u, stats = mean_velocity(
        LAW, _points(), T, R, solver=f"torchdiffeq:{method}", rtol=tolerance, atol=tolerance, return_stats=True
    )
    torch.testing.assert_close(u, LAW.mean_velocity(_points(), T, R), rtol=100 * tolerance, atol=100 * tolerance)
    assert stats.status.tolist() == [0, 0, 0, 0]
    assert int(stats.evaluations.unique()) > 5


def test_dopri5_agrees_with_bosh3_and_rk4_on_a_mixture() -> None:
    reference = mean_velocity(MIXTURE, _points(), T, R, solver="torchdiffeq:dopri5", rtol=1e-10, atol=1e-10)
    adaptive = mean_velocity(MIXTURE, _points(), T, R, solver="bosh3", rtol=1e-8, atol=1e-8)
    fixed = mean_velocity(MIXTURE, _points(), T, R, solver="rk4", step_size=0.01)
    torch.testing.assert_close(adaptive, reference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fixed, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("ours", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2")])
@pytest.mark.parametrize("steps", [1, 3, 49])
def test_fixed_methods_agree_to_rounding(ours: str, theirs: str, steps: int) -> None:
    end, stats = integrate(MIXTURE, _points(), T, R, solver=f"torchdiffeq:{theirs}", steps=steps, return_stats=True)
    torch.testing.assert_close(end, integrate(MIXTURE, _points(), T, R, solver=ours, steps=steps), rtol=0, atol=1e-13)
    assert stats.steps.tolist() == [steps, steps, 0, steps]
    assert torch.equal(end[2], _points()[2])


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_fixed_methods_find_the_flow_map(method: str) -> None:
    u = mean_velocity(LAW, _points(), T, R, solver=f"torchdiffeq:{method}", steps=200)
    tolerance = 5e-2 if method == "euler" else 1e-4
    torch.testing.assert_close(u, LAW.mean_velocity(_points(), T, R), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_rounding_does_not_add_a_step(dtype: torch.dtype) -> None:
    """1 / (1/49) is more than 49."""
    counts = {}
    for steps in range(1, 100):
        _, stats = mean_velocity(
            LAW, _points(dtype)[:1], 1.0, 0.0, solver="torchdiffeq:euler", steps=steps, return_stats=True
        )
        counts[steps] = int(stats.evaluations)
    assert counts == {steps: steps + 1 for steps in range(1, 100)}  # one more for the velocity at t


def test_step_size_is_the_largest_step_of_adaptive_methods() -> None:
    counts = []
    for step_size in (None, 0.02):
        _, stats = mean_velocity(
            LAW, _points(), 0.9, 0.1, solver="torchdiffeq:dopri5", step_size=step_size, return_stats=True
        )
        counts.append(int(stats.evaluations[0]))
    assert counts[0] < 40 * 6 <= counts[1]


def test_equal_times_only_cost_one_evaluation() -> None:
    u, stats = mean_velocity(LAW, _points(), T, T, solver="torchdiffeq:dopri5", return_stats=True)
    assert torch.equal(u, LAW(_points(), T))
    assert stats.evaluations.tolist() == [1, 1, 1, 1]
    assert stats.steps.tolist() == [0, 0, 0, 0]


def test_gradients_flow_through() -> None:
    x = _points().requires_grad_()
    u = mean_velocity(LAW, x, 0.9, 0.1, solver="torchdiffeq:dopri5", rtol=1e-9, atol=1e-9, differentiable=True)
    (slope,) = torch.autograd.grad(u.sum(), x)
    sigma_t, sigma_r = ((((1 - t) * LAW.std) ** 2 + t**2).sqrt() for t in (0.9, 0.1))
    torch.testing.assert_close(slope, ((1 - sigma_r / sigma_t) / 0.8).expand(4, 2), rtol=1e-7, atol=1e-7)


def test_giving_up_is_an_error() -> None:
    def field(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t[:, None] < 0.5, torch.nan, x)

    with pytest.raises(RuntimeError, match="solver 'torchdiffeq:dopri5' gave up: underflow in dt"):
        mean_velocity(field, _points(), 0.9, 0.1, solver="torchdiffeq:dopri5")


def test_velocities_that_are_not_finite_are_reported() -> None:
    def field(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((x < -1e3) | (t[:, None] < 0.5), torch.nan, x)

    t = torch.tensor([0.9, 0.9, 0.4, 0.9])
    _, stats = mean_velocity(field, _points(), t, 0.6, solver="torchdiffeq:rk4", steps=5, return_stats=True)
    assert stats.status.tolist() == [0, 0, 3, 0]
    assert stats.first_bad is not None
    assert stats.first_bad == (2, pytest.approx(0.4))


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ModuleNotFoundError, match=r"'torchdiffeq:rk4' needs torchdiffeq: pip install 'mfd_fast\[peers"):
        mean_velocity(LAW, _points(), 0.9, 0.1, solver="torchdiffeq:rk4")
