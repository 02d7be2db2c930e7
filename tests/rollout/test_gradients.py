"""Derivatives through the solver where they are asked for, constants otherwise."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mfd_fast import integrate, mean_velocity, mean_velocity_pair, native
from mfd_fast.closed_forms import Gaussian, GaussianMixture
from mfd_fast.solvers import SOLVERS

LAW = Gaussian([1.3, -0.4], [0.6, 1.7])
MIXTURE = GaussianMixture([0.5, 0.5], [[1.5, 0.0], [-1.0, 1.0]], [0.5, 0.8])

# The first use of forward mode makes torch compile rules of its own with torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 16, dtype=torch.float64), nn.Linear(16, 2, dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        velocity: Tensor = self.outer(torch.tanh(self.inner(torch.cat([x, t.to(x)[:, None]], 1))))
        return velocity


@pytest.fixture
def network() -> _Network:
    torch.manual_seed(0)
    return _Network()


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.tensor([0.9, 0.3, 0.5], dtype=torch.float64), torch.tensor([0.2, 0.8, 0.5], dtype=torch.float64)


def _plain_euler(field: Callable[..., Tensor], x: Tensor, t: Tensor, r: Tensor, steps: int) -> Tensor:
    y, h = x, (r - t) / steps
    total = torch.zeros_like(x)
    for step in range(steps):
        velocity = field(y, t + step * h)
        y = y + h[:, None] * velocity
        total = total + velocity / steps
    return total


def test_gradients_equal_those_of_a_plain_loop(network: _Network) -> None:
    x, t, r = _batch()
    weights = list(network.parameters())
    found = []
    for function in (
        lambda x: mean_velocity(network, x, t, r, steps=5, differentiable=True),
        lambda x: _plain_euler(network, x, t, r, 5),
    ):
        start = x.clone().requires_grad_()
        found.append(torch.autograd.grad(function(start).square().sum(), [start, *weights]))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    assert all(bool((part != 0).any()) for part in found[0])
    assert all(weight.grad is None for weight in weights)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_is_differentiable_in_state_and_times(name: str) -> None:
    x, t, r = (part.clone().requires_grad_() for part in _batch())

    def function(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        result: Tensor = mean_velocity(MIXTURE, x, t, r, solver=name, steps=3, differentiable=True)
        return result

    t, r = t[:2].detach().requires_grad_(), r[:2].detach().requires_grad_()
    assert torch.autograd.gradcheck(function, (x[:2].detach().requires_grad_(), t, r), check_forward_ad=True)


def test_adaptive_steps_are_differentiable_in_the_state() -> None:
    x, t, r = _batch()
    x.requires_grad_()
    for function, factor in ((mean_velocity, 1 / (t - r)[:2]), (integrate, None)):
        result = function(LAW, x, t, r, solver="bosh3", rtol=1e-9, atol=1e-9, differentiable=True)
        (slope,) = torch.autograd.grad(result[:2].sum(), x)
        sigma_t, sigma_r = (torch.hypot((1 - time[:2, None]) * LAW.std, time[:2, None]) for time in (t, r))
        ratio = sigma_r / sigma_t
        expected = ratio if factor is None else (1 - ratio) * factor[:, None]
        torch.testing.assert_close(slope[:2], expected, rtol=1e-6, atol=1e-6)
        assert not slope[2].any()


@pytest.mark.parametrize("name", ["t", "r"])
def test_adaptive_steps_have_no_derivative_by_time(name: str) -> None:
    """The steps are chosen from values, so it would be silently wrong."""
    x, t, r = _batch()
    times = {"t": t, "r": r}
    message = f"{name} must be a constant for an adaptive solver; take steps= or a fixed-step solver"
    with forward_ad.dual_level():
        dual = times | {name: forward_ad.make_dual(times[name], torch.ones(3, dtype=torch.float64))}
        with pytest.raises(ValueError, match=message):
            mean_velocity(LAW, x, **dual, solver="bosh3")
    times[name].requires_grad_()
    with pytest.raises(ValueError, match=message):
        mean_velocity(LAW, x, **times, solver="bosh3", differentiable=True)
    assert not mean_velocity(LAW, x, **times, solver="bosh3").requires_grad


@pytest.mark.parametrize("kwargs", [{"steps": 3}, {"solver": "bosh3"}], ids=["fixed", "adaptive"])
def test_results_are_constants_by_default(kwargs: dict[str, Any], network: _Network) -> None:
    x, t, r = _batch()
    x.requires_grad_()
    r = r.clone().requires_grad_()
    results = [
        mean_velocity(network, x, t, r, **kwargs),
        integrate(network, x, t, r, **kwargs),
        *mean_velocity_pair(network, network, x, t, r, **kwargs),
        mean_velocity(network, x, t, t, **kwargs),
        mean_velocity(network, x[:0], t[:0], r[:0], **kwargs),
        integrate(network, x[:0], t[:0], r[:0], **kwargs),
    ]
    assert not any(result.requires_grad for result in results)
    assert torch.is_grad_enabled()


def test_no_grad_wins_over_differentiable(network: _Network) -> None:
    x, t, r = _batch()
    with torch.no_grad():
        assert not mean_velocity(network, x, t, r, steps=2, differentiable=True).requires_grad


def test_both_of_a_pair_are_differentiable(network: _Network) -> None:
    x, t, r = _batch()
    torch.manual_seed(1)
    teacher = _Network()
    pair = mean_velocity_pair(teacher, network, x, t, r, steps=4, differentiable=True)
    for u, field in zip(pair, (teacher, network), strict=True):
        weights = list(field.parameters())
        expected = torch.autograd.grad(_plain_euler(field, x, t, r, 4).sum(), weights)
        for ours, plain in zip(torch.autograd.grad(u.sum(), weights), expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_guidance_is_differentiable() -> None:
    x, t, r = _batch()
    scale = torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    push = torch.ones(3, 2, dtype=torch.float64)
    u = mean_velocity(
        lambda x, t, push: push,
        x,
        t,
        r,
        steps=3,
        condition={"push": push},
        negative_condition={"push": torch.zeros(1, 2, dtype=torch.float64)},
        guidance_scale=scale,
        differentiable=True,
    )
    (slope,) = torch.autograd.grad(u.sum(), scale)
    torch.testing.assert_close(slope, torch.full_like(scale, 2.0))


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("name", SOLVERS)
def test_forward_mode_of_functional_transforms(name: str, differentiable: bool) -> None:
    """A silent zero would be the worst outcome: the tangent is right, asked for or not."""
    x, t, r = _batch()
    tangents = torch.randn(3, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64), torch.ones_like(t)

    def function(x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = mean_velocity(MIXTURE, x, t, r, solver=name, steps=3, differentiable=differentiable)
        return result

    value, tangent = torch.func.jvp(function, (x, t), tangents)
    assert torch.equal(value, function(x, t))
    step = 1e-6
    ends = [function(x + sign * step * tangents[0], t + sign * step * tangents[1]) for sign in (1, -1)]
    # A row of equal times becomes one of three steps when t moves, so only the others have a difference quotient.
    torch.testing.assert_close(tangent[:2], (ends[0] - ends[1])[:2] / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("core", [True, False], ids=["compiled", "python"])
def test_forward_mode_of_adaptive_steps_is_right_or_fails(core: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not core:
        monkeypatch.setattr(native, "core", lambda: None)
    x, t, r = _batch()
    direction = torch.ones_like(x)

    def function(x: Tensor) -> Tensor:
        result: Tensor = integrate(LAW, x, t, r, solver="bosh3", rtol=1e-6, atol=1e-6)
        return result

    tangent = None
    with suppress(RuntimeError) if core else nullcontext():
        _, tangent = torch.func.jvp(function, (x,), (direction,))
    sigma_t, sigma_r = (torch.hypot((1 - time[:, None]) * LAW.std, time[:, None]) for time in (t, r))
    assert (tangent is None and core) or torch.allclose(tangent, sigma_r / sigma_t, rtol=1e-4, atol=1e-4)
