"""Rows that end early: what is returned, what is reported, what is raised."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast import Status, integrate, mean_velocity, mean_velocity_pair
from mfd_fast.closed_forms import Gaussian
from mfd_fast.rollout import finite
from mfd_fast.solvers import SOLVERS

LAW = Gaussian([1.3, -0.4], [0.6, 1.7])


def _points(rows: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize(
    ("name", "budget", "steps"),
    [("euler", 3, 3), ("midpoint", 7, 3), ("heun", 6, 3), ("ab2", 4, 3), ("rk4", 15, 3), ("bosh3", 12, 3)],
)
def test_a_used_up_budget_leaves_the_mean_velocity_of_the_part(name: str, budget: int, steps: int) -> None:
    x, r = _points(), torch.tensor([0.1, 0.9, 0.9, 0.6], dtype=torch.float64)  # of rows that start at 0.9
    u, stats = mean_velocity(LAW, x, 0.9, r, solver=name, steps=8, max_evaluations=budget, return_stats=True)
    assert stats.status.tolist() == [Status.MAX_EVALUATIONS, Status.SUCCESS, Status.SUCCESS, Status.MAX_EVALUATIONS]
    assert stats.steps.tolist() == [steps, 0, 0, steps]
    assert bool((stats.evaluations <= budget).all())
    reached = 0.9 + (r - 0.9) * steps / 8
    partial = mean_velocity(LAW, x, 0.9, reached, solver=name, steps=steps)
    torch.testing.assert_close(u, partial, rtol=1e-12, atol=1e-12)
    end, _ = integrate(LAW, x, 0.9, r, solver=name, steps=8, max_evaluations=budget, return_stats=True)
    torch.testing.assert_close(end, x + (reached - 0.9)[:, None] * partial, rtol=1e-12, atol=1e-12)


def test_a_budget_that_is_enough_changes_nothing() -> None:
    u, stats = mean_velocity(LAW, _points(), 0.9, 0.1, steps=8, max_evaluations=8, return_stats=True)
    assert stats.status.tolist() == [Status.SUCCESS] * 4
    assert torch.equal(u, mean_velocity(LAW, _points(), 0.9, 0.1, steps=8))


def test_a_guided_budget_counts_both_evaluations() -> None:
    kwargs: dict[str, Any] = {"negative_condition": {}, "guidance_scale": 2.0, "return_stats": True}
    _, stats = mean_velocity(LAW, _points(), 0.9, 0.1, steps=8, max_evaluations=7, **kwargs)
    assert stats.steps.tolist() == [3] * 4
    assert stats.evaluations.tolist() == [6] * 4


def test_an_adaptive_row_that_runs_out_keeps_the_part_it_covered(watched: Any) -> None:
    x, rows = _points(2), torch.arange(2)
    r = torch.tensor([0.1, 0.89], dtype=torch.float64)
    field = watched(LAW)
    u, stats = mean_velocity(
        field,
        x,
        0.9,
        r,
        solver="bosh3",
        rtol=1e-6,
        atol=1e-6,
        max_evaluations=12,
        condition={"row": rows},
        return_stats=True,
    )
    assert stats.status.tolist() == [Status.MAX_EVALUATIONS, Status.SUCCESS]
    assert field.evaluations(2) == stats.evaluations.tolist()
    assert stats.evaluations[0] <= 12
    assert 0 < stats.steps[0] <= 3
    ends = sorted(field.times(0)[3::3])  # the ends of the steps that were tried; the last accepted one was reached
    candidates = [LAW.mean_velocity(x[:1], torch.tensor([0.9]), torch.tensor([end])) for end in ends]
    assert min(float((u[:1] - candidate).abs().max()) for candidate in candidates) < 1e-5
    torch.testing.assert_close(u[1:], LAW.mean_velocity(x[1:], torch.tensor([0.9]), r[1:]), rtol=1e-5, atol=1e-5)


def test_an_adaptive_row_without_a_single_step_has_the_velocity() -> None:
    u, stats = mean_velocity(LAW, _points(), 0.9, 0.1, solver="bosh3", max_evaluations=3, return_stats=True)
    assert stats.status.tolist() == [Status.MAX_EVALUATIONS] * 4
    assert stats.evaluations.tolist() == [1] * 4
    assert torch.equal(u, LAW(_points(), torch.full((4,), 0.9, dtype=torch.float64)))


@pytest.mark.parametrize("kwargs", [{"steps": 8, "max_evaluations": 3}, {"solver": "bosh3", "max_evaluations": 4}])
@pytest.mark.parametrize("function", [mean_velocity, integrate])
def test_a_used_up_budget_is_an_error_unless_asked(function: Any, kwargs: dict[str, Any]) -> None:
    message = r"row 1 did not reach r: max_evaluations was used up .* \(pass return_stats=True to get the other rows"
    r = torch.tensor([0.9, 0.1, 0.9, 0.1], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=message):
        function(LAW, _points(), 0.9, r, **kwargs)


def _noise(x: Tensor, t: Tensor) -> Tensor:
    """Not a function of time that any step is short enough for, in the rows that are told to be rough."""
    return torch.where(x > 100, 1e9 * torch.sin(1e9 * t.double())[:, None].to(x), -x)


def test_a_vanishing_step() -> None:
    x = torch.tensor([[0.5], [1000.0], [1.5]])
    kwargs: dict[str, Any] = {"solver": "bosh3", "rtol": 1e-6, "atol": 1e-6}
    u, stats = mean_velocity(_noise, x, 0.9, 0.1, return_stats=True, **kwargs)
    assert stats.status.tolist() == [Status.SUCCESS, Status.STEP_SIZE_UNDERFLOW, Status.SUCCESS]
    assert stats.first_bad is None
    assert bool(u.isfinite().all())
    smooth = mean_velocity(_noise, x[::2], 0.9, 0.1, **kwargs)
    assert torch.equal(u[::2], smooth)
    with pytest.raises(RuntimeError, match="row 1 did not reach r: The step size fell below the resolution of time"):
        mean_velocity(_noise, x, 0.9, 0.1, **kwargs)


def _broken(value: float) -> Any:
    def field(x: Tensor, t: Tensor, *, row: Tensor) -> Tensor:
        velocity = LAW(x, t)
        velocity[(row == 2) & (t < 0.5)] = value
        return velocity

    return field


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("name", [*SOLVERS, "bosh3-adaptive"])
def test_a_velocity_that_is_not_finite(name: str, value: float) -> None:
    x, r = _points(), torch.tensor([0.1, 0.6, 0.1, 0.9], dtype=torch.float64)
    condition = {"row": torch.arange(4)}
    kwargs: dict[str, Any] = {"solver": name.removesuffix("-adaptive")}
    kwargs |= {} if name == "bosh3-adaptive" else {"steps": 16}
    u, stats = mean_velocity(_broken(value), x, 0.9, r, condition=condition, return_stats=True, **kwargs)
    assert stats.status.tolist() == [Status.SUCCESS, Status.SUCCESS, Status.NON_FINITE, Status.SUCCESS]
    others = torch.tensor([0, 1, 3])
    assert torch.equal(u[others], mean_velocity(LAW, x[others], 0.9, r[others], **kwargs))
    assert stats.first_bad is not None
    row, time = stats.first_bad
    assert row == 2
    assert 0.35 < time < 0.5
    message = f"the field returned NaN or infinity in row 2 at time {time:g}; pass return_stats=True"
    for function in (mean_velocity, integrate):
        with pytest.raises(FloatingPointError, match=re.escape(message)):
            function(_broken(value), x, 0.9, r, condition=condition, **kwargs)


def test_the_first_bad_row_is_named_in_the_callers_order() -> None:
    def field(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(x > 0, torch.nan, x)

    t, r = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([0.5, 0.4, 0.0, 0.3])
    x = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]])
    _, stats = mean_velocity(field, x, t, r, step_size=0.1, return_stats=True)
    assert stats.first_bad == (2, 0.5)
    assert stats.status.tolist() == [0, 0, 3, 3]


def test_a_bad_row_whose_field_does_not_repeat_itself() -> None:
    calls = 0

    def field(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.full_like(x, torch.nan) if calls == 2 else x

    _, stats = mean_velocity(field, torch.ones(1, 1), 0.5, 0.0, steps=4, return_stats=True)
    assert stats.first_bad == (0, 0.5)


def test_a_pair_names_the_rows_of_each() -> None:
    x, condition = _points(), {"row": torch.arange(4)}

    def good(x: Tensor, t: Tensor, *, row: Tensor) -> Tensor:
        return LAW(x, t)

    _, u, stats = mean_velocity_pair(
        _broken(torch.nan), good, x, 0.9, 0.1, steps=8, condition=condition, return_stats=True
    )
    assert stats.teacher.status.tolist() == [0, 0, 3, 0]
    assert stats.auxiliary.status.tolist() == [0, 0, 0, 0]
    assert torch.equal(u, mean_velocity(LAW, x, 0.9, 0.1, steps=8))
    with pytest.raises(FloatingPointError, match="row 2"):
        mean_velocity_pair(good, _broken(torch.nan), x, 0.9, 0.1, steps=8, condition=condition)


@pytest.fixture
def pending(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The queue of checks that a device has not answered yet."""
    queue: Any = type(finite._PENDING)()
    monkeypatch.setattr(finite, "_PENDING", queue)
    return queue


def test_a_late_answer_of_a_device_is_raised_by_a_later_call(pending: Any) -> None:
    arrived = False
    for bad in (False, True, False):
        pending.append(finite._Pending(torch.tensor(bad), lambda: arrived))
    mean_velocity(LAW, _points(), 0.9, 0.1, steps=1)
    assert len(pending) == 3
    arrived = True
    with pytest.raises(FloatingPointError, match="an earlier rollout met a velocity that was not finite"):
        mean_velocity(LAW, _points(), 0.9, 0.1, steps=1)
    assert len(pending) == 0
    mean_velocity(LAW, _points(), 0.9, 0.1, steps=1)
