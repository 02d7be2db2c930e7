"""Timings of a user's field: who is compared, in which order, with which errors."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfd_fast
from mfd_fast.bench import Timing, compare_runners, format_timings
from mfd_fast.closed_forms import Gaussian
from mfd_fast.intervals import Uniform, sample_pairs


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.law = Gaussian(mean=1.0, std=0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.law(x, t)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t, r = sample_pairs(Uniform(), 12, generator=generator)
    return torch.randn(12, 3, generator=generator), t, r


def test_every_runner_is_timed_on_the_same_numbers() -> None:
    timings = compare_runners(Field(), *problem(), step_size=0.1, repeats=2)
    assert {timing.name for timing in timings} == {"eager", "compiled", "torchdiffeq"}
    by_name = {timing.name: timing for timing in timings}
    assert by_name["compiled"].error == pytest.approx(by_name["eager"].error, rel=1e-3)
    assert 1e-3 < by_name["eager"].error < 0.3
    # Lock-step takes the steps of the widest interval in every row: more work, smaller steps.
    assert by_name["torchdiffeq"].evaluations > 1.3 * by_name["eager"].evaluations
    assert by_name["torchdiffeq"].error < by_name["eager"].error
    assert [timing.milliseconds for timing in timings] == sorted(timing.milliseconds for timing in timings)


def test_what_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "torchdiffeq" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    (only,) = compare_runners(Gaussian(mean=1.0, std=0.5), *problem(), step_size=0.1, repeats=1)
    assert only.name == "eager"


def test_table() -> None:
    table = format_timings([Timing("compiled", 2.0, 0.01, 9.5), Timing("eager", 5.0, 0.01, 9.5)]).splitlines()
    assert len(table) == 3
    assert table[1].split() == ["compiled", "2.00", "1.00x", "1.0e-02", "9.5"]
    assert table[2].split() == ["eager", "5.00", "2.50x", "1.0e-02", "9.5"]


def test_the_error_of_a_pair_is_that_of_the_gradient() -> None:
    x, t, r = problem()
    far, near = Gaussian(mean=3.0, std=0.5), Gaussian(mean=1.0, std=0.5)
    (timing,) = (
        found
        for found in compare_runners(near, x, t, r, auxiliary=far, step_size=0.1, repeats=1)
        if found.name == "eager"
    )
    u = [mfd_fast.mean_velocity(field, x, t, r, step_size=0.1) for field in (near, far)]
    exact = [mfd_fast.mean_velocity(field, x, t, r, solver="rk4", step_size=0.01) for field in (near, far)]
    gap, fine = u[0] - u[1], exact[0] - exact[1]
    assert timing.error == pytest.approx(float((gap - fine).norm() / fine.norm()), rel=1e-3)
    assert timing.error > 0.0


def test_wrong_arguments_are_not_taken_for_a_runner_that_cannot() -> None:
    with pytest.raises(ValueError, match="step_size"):
        compare_runners(Field(), *problem(), step_size=-1.0)
