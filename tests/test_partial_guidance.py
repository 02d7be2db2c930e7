"""Guidance in an interval of time and negative velocities that serve several evaluations: values and costs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast import mean_velocity, mean_velocity_pair
from mfd_fast.closed_forms import Gaussian
from mfd_fast.guidance import combine
from mfd_fast.models import build_model
from mfd_fast.models.lora import LoRARoles
from mfd_fast.recommend import SAVED, SAVINGS, recommend

LAWS = [Gaussian([1.3, -0.4], [0.6, 1.7]), Gaussian([-1.0, 0.0], [1.0, 0.5])]
T, R = torch.tensor([0.9, 0.2, 0.5, 0.7, 1.0]), torch.tensor([0.1, 0.8, 0.5, 0.6, 0.0])
LABEL = torch.tensor([0, 1, 0, 1, 0])
GUIDANCE: dict[str, Any] = {
    "condition": {"label": LABEL},
    "negative_condition": {"label": torch.tensor([1])},
    "guidance_scale": 3.0,
    "return_stats": True,
}


class Counted:
    """One of two laws by label; counts the rows that it computes."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
        self.rows += len(x)
        return torch.where((label == 0)[:, None], LAWS[0](x, t), LAWS[1](x, t))


def points() -> Tensor:
    return torch.randn(5, 2, generator=torch.Generator().manual_seed(0))


def euler_by_hand(row: int, steps: int, interval: tuple[float, float], every: int) -> tuple[Tensor, int]:
    """One row, one step after the other: mean velocity and rows computed."""
    x, t, r = points()[row : row + 1], T[row : row + 1], R[row : row + 1]
    label, h = LABEL[row : row + 1], (r - t) / steps
    start, displacement, computed, guided, negative = x, torch.zeros_like(x), 0, 0, torch.zeros_like(x)
    for step in range(steps):
        now = t + step * h
        velocity, computed = Counted()(x, now, label=label), computed + 1
        if interval[0] <= float(now) <= interval[1]:
            if guided % every == 0:
                negative, computed = LAWS[1](x, now), computed + 1
            guided += 1
            velocity = combine(velocity, negative, torch.tensor([3.0]))
        displacement = displacement + h * velocity
        x = start + displacement
    return displacement / (r - t), computed


@pytest.mark.parametrize("interval", [(0.25, 0.65), (0.0, 0.5), (-1.0, 2.0)], ids=str)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_equals_row_by_row(interval: tuple[float, float], every: int) -> None:
    field = Counted()
    u, stats = mean_velocity(
        field, points(), T, R, step_size=0.1, guidance_interval=interval, negative_every=every, **GUIDANCE
    )
    for row in (0, 1, 3, 4):
        expected, computed = euler_by_hand(row, int(stats.steps[row]), interval, every)
        torch.testing.assert_close(u[row : row + 1], expected, rtol=1e-5, atol=1e-5)
        assert stats.evaluations[row] == computed
    assert int(stats.evaluations.sum()) == field.rows, "nothing is computed that is not counted"


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "rk4", "bosh3"])
def test_an_interval_that_holds_everything_changes_nothing(solver: str) -> None:
    options: dict[str, Any] = {"solver": solver, **GUIDANCE}
    u, stats = mean_velocity(Counted(), points(), T, R, guidance_interval=[0.0, 1.0], **options)
    expected, full = mean_velocity(Counted(), points(), T, R, **options)
    torch.testing.assert_close(u, expected, rtol=1e-6, atol=1e-6)
    assert stats.evaluations.tolist() == full.evaluations.tolist()


@pytest.mark.parametrize("solver", ["heun", "ab2", "rk4", "bosh3"])
def test_what_is_counted_is_what_is_computed(solver: str) -> None:
    field = Counted()
    _, stats = mean_velocity(
        field, points(), T, R, solver=solver, guidance_interval=(0.3, 0.6), negative_every=2, **GUIDANCE
    )
    assert int(stats.evaluations.sum()) == field.rows


def test_an_interval_without_a_row_is_no_guidance() -> None:
    options = GUIDANCE | {"guidance_scale": 1.0, "negative_condition": None}
    plain, cost = mean_velocity(Counted(), points(), T, R, **options)
    u, stats = mean_velocity(Counted(), points(), T, R, guidance_interval=(2.0, 3.0), **GUIDANCE)
    assert torch.equal(u, plain)
    assert stats.evaluations.tolist() == cost.evaluations.tolist()


def test_without_guidance_there_is_nothing_to_save() -> None:
    options = GUIDANCE | {"guidance_scale": 1.0}
    u, stats = mean_velocity(Counted(), points(), T, R, negative_every=3, **options)
    expected, full = mean_velocity(Counted(), points(), T, R, **options)
    assert torch.equal(u, expected)
    assert stats.evaluations.tolist() == full.evaluations.tolist()


def test_a_gradient_passes_through_kept_velocities() -> None:
    x = points().double().requires_grad_()
    options = GUIDANCE | {"return_stats": False, "differentiable": True, "negative_every": 2}

    def total(state: Tensor) -> Tensor:
        result: Tensor = mean_velocity(Counted(), state, T, R, step_size=0.2, **options).square().sum()
        return result

    (gradient,) = torch.autograd.grad(total(x), x)
    step = torch.zeros_like(x).index_fill(0, torch.tensor([0]), 1e-6)
    with torch.no_grad():
        slope = (total(x + step) - total(x - step)) / 2e-6
    assert float(gradient[0].sum()) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.parametrize("kind", ["module", "lora"])
def test_pairs_and_fields_of_a_shared_backbone(kind: str) -> None:
    torch.manual_seed(0)
    network = build_model("mlp", (2,), 2, width=16, depth=1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    roles = LoRARoles(network, rank=2, alpha=2.0)
    teacher, auxiliary = (network, network) if kind == "module" else (roles.teacher, roles.auxiliary)
    options: dict[str, Any] = {"step_size": 0.1, "guidance_interval": (0.2, 0.7), "negative_every": 2, **GUIDANCE}
    u, other, pair = mean_velocity_pair(teacher, auxiliary, points(), T, R, **options)
    expected, stats = mean_velocity(network, points(), T, R, **options)
    torch.testing.assert_close(u, expected, rtol=1e-5, atol=1e-5)
    assert pair.teacher.evaluations.tolist() == stats.evaluations.tolist()
    plain = mean_velocity(network, points(), T, R, step_size=0.1, condition={"label": LABEL})
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)


def test_a_row_that_fails_is_found_and_counted_once() -> None:
    class Broken(Counted):
        def __call__(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
            return (
                super().__call__(x, t, label=label).masked_fill((t < 0.35)[:, None] & (label == 0)[:, None], torch.nan)
            )

    _, stats = mean_velocity(Broken(), points(), T, R, step_size=0.1, negative_every=2, **GUIDANCE)
    _, whole = mean_velocity(Counted(), points(), T, R, step_size=0.1, negative_every=2, **GUIDANCE)
    assert stats.first_bad is not None
    assert stats.first_bad[0] == 0
    assert stats.evaluations.tolist() == whole.evaluations.tolist()


def test_recommend_measures_what_is_saved() -> None:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(5, 2, generator=generator), T
    options = {name: value for name, value in GUIDANCE.items() if name != "return_stats"}
    auxiliary = lambda x, t, label: LAWS[0](x, t)  # noqa: E731
    found = recommend(Counted(), x, t, R, auxiliary=auxiliary, **options)
    saved = [trial for trial in found.trials if trial.options.keys() & {"negative_every", "guidance_interval"}]
    assert len(saved) == len(SAVED) * len(SAVINGS)
    fine, other = (
        mean_velocity_pair(Counted(), auxiliary, x, t, R, solver="rk4", step_size=0.005, **options)[index]
        for index in (0, 1)
    )
    for trial in saved:
        u, v, stats = mean_velocity_pair(
            Counted(), auxiliary, x, t, R, solver=trial.solver, **trial.options, **options, return_stats=True
        )
        error = float((u - v - fine + other).norm() / (fine - other).norm())
        assert trial.error == pytest.approx(error, rel=1e-3)
        evaluations = (stats.teacher.evaluations + stats.auxiliary.evaluations).double().mean()
        assert trial.evaluations == pytest.approx(float(evaluations))
        solver = next(
            t
            for t in found.trials
            if (t.solver, t.options) == (trial.solver, {"step_size": trial.options["step_size"]})
        )
        assert trial.evaluations <= solver.evaluations
    assert "guidance_interval=[0.1, 0.9]" in found.table()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"guidance_interval": (0.6, 0.2)}, ValueError, r"guidance_interval must be two times in rising order"),
        (
            {"guidance_interval": (0.6,)},
            ValueError,
            r"guidance_interval must be two times in rising order, got \(0.6,\)",
        ),
        ({"guidance_interval": 0.5}, TypeError, "guidance_interval must be two numbers or None, got 0.5"),
        ({"negative_every": 0}, ValueError, "negative_every must be at least 1, got 0"),
        ({"negative_every": 1.5}, TypeError, "negative_every must be an int, got float"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mean_velocity(Counted(), points(), T, R, **GUIDANCE, **options)
