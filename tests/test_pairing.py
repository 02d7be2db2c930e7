"""Teacher and auxiliary on one backbone run as one batch, and get what they would get alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast import mean_velocity, mean_velocity_pair
from mfd_fast.fields import autocast
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.models.lora import LoRARoles
from mfd_fast.pairing import paired
from mfd_fast.solvers import SOLVERS

ROWS = 6
T = torch.tensor([0.9, 0.2, 0.5, 0.7, 1.0, 0.35])
R = torch.tensor([0.1, 0.6, 0.5, 0.6, 0.0, 0.3])
NEGATIVE = {"label": torch.tensor([10])}


@pytest.fixture
def roles(digits_teacher: VelocityNetwork) -> LoRARoles:
    """Roles on the digits teacher whose auxiliary has learned something."""
    roles = LoRARoles(digits_teacher, rank=4, alpha=4.0)
    generator = torch.Generator().manual_seed(0)
    for parameter in roles.parameters("auxiliary"):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return roles


@pytest.fixture
def forwards(roles: LoRARoles) -> list[int]:
    """Rows of each forward of the backbone."""
    rows: list[int] = []
    roles.network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


def _batch() -> tuple[Tensor, dict[str, Tensor]]:
    x = torch.randn(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, {"label": torch.tensor([3, 1, 4, 1, 5, 9])}


def _assert_as_alone(u: Tensor, alone: Tensor) -> None:
    assert float((u - alone).norm() / alone.norm()) < 1e-6


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5], ids=["plain", "guided"])
@pytest.mark.parametrize("name", SOLVERS)
def test_one_batch_equals_two(name: str, guidance_scale: float, roles: LoRARoles, forwards: list[int]) -> None:
    x, condition = _batch()
    kwargs: dict[str, Any] = {"solver": name, "steps": 3, "condition": condition}
    guidance: dict[str, Any] = {"guidance_scale": guidance_scale, "negative_condition": NEGATIVE}
    teacher, auxiliary, stats = mean_velocity_pair(
        roles.teacher, roles.auxiliary, x, T, R, return_stats=True, **kwargs, **guidance
    )
    together = list(forwards)
    forwards.clear()
    alone, teacher_stats = mean_velocity(roles.teacher, x, T, R, return_stats=True, **kwargs, **guidance)
    other, auxiliary_stats = mean_velocity(roles.auxiliary, x, T, R, return_stats=True, **kwargs)
    _assert_as_alone(teacher, alone)
    _assert_as_alone(auxiliary, other)
    assert float((teacher - auxiliary).norm() / auxiliary.norm()) > 1e-2

    assert len(forwards) == 2 * len(together)
    assert sum(forwards) == sum(together)
    for part, expected in ((stats.teacher, teacher_stats), (stats.auxiliary, auxiliary_stats)):
        for counted in ("evaluations", "steps", "status"):
            assert torch.equal(getattr(part, counted), getattr(expected, counted))
    assert sum(together) == int(stats.teacher.evaluations.sum() + stats.auxiliary.evaluations.sum())
    assert together[0] == (3 if guidance_scale > 1 else 2) * ROWS
    assert together[-1] < together[0], "the row of equal times should be gone after the first evaluation"


def test_a_scale_for_each_row(roles: LoRARoles) -> None:
    x, condition = _batch()
    scale = torch.tensor([1.0, 0.0, 2.0, 4.5, 3.0, 7.0])
    kwargs: dict[str, Any] = {"step_size": 0.1, "condition": condition}
    guidance: dict[str, Any] = {"guidance_scale": scale, "negative_condition": NEGATIVE}
    teacher, auxiliary = mean_velocity_pair(roles.teacher, roles.auxiliary, x, T, R, **kwargs, **guidance)
    _assert_as_alone(teacher, mean_velocity(roles.teacher, x, T, R, **kwargs, **guidance))
    _assert_as_alone(auxiliary, mean_velocity(roles.auxiliary, x, T, R, **kwargs))


def test_without_a_condition(roles: LoRARoles, forwards: list[int]) -> None:
    x, _ = _batch()
    teacher, auxiliary = mean_velocity_pair(roles.teacher, roles.auxiliary, x, T, R, steps=2)
    assert forwards == [2 * ROWS, 2 * (ROWS - 1)]
    _assert_as_alone(teacher, mean_velocity(roles.teacher, x, T, R, steps=2))
    _assert_as_alone(auxiliary, mean_velocity(roles.auxiliary, x, T, R, steps=2))


@pytest.mark.parametrize(
    "apart",
    [
        {"auxiliary_solver": "heun"},
        {"auxiliary_step_size": 0.2},
        {"solver": "bosh3"},
        {"max_evaluations": 50},
    ],
    ids=str,
)
def test_what_steps_differently_runs_apart(apart: dict[str, Any], roles: LoRARoles, forwards: list[int]) -> None:
    x, condition = _batch()
    kwargs: dict[str, Any] = {"step_size": 0.1, "condition": condition} | apart
    teacher, auxiliary = mean_velocity_pair(roles.teacher, roles.auxiliary, x, T, R, **kwargs)
    assert max(forwards) == ROWS
    shared = {key: kwargs[key] for key in ("condition", "max_evaluations") if key in kwargs}
    solver = kwargs.get("solver", "euler")
    assert torch.equal(teacher, mean_velocity(roles.teacher, x, T, R, step_size=0.1, solver=solver, **shared))
    alone = mean_velocity(
        roles.auxiliary,
        x,
        T,
        R,
        step_size=kwargs.get("auxiliary_step_size", 0.1),
        solver=kwargs.get("auxiliary_solver", solver),
        **shared,
    )
    assert torch.equal(auxiliary, alone)


@pytest.mark.parametrize("same", [{"auxiliary_solver": "euler"}, {"auxiliary_step_size": 0.1}], ids=str)
def test_the_same_steps_said_twice_run_together(same: dict[str, Any], roles: LoRARoles, forwards: list[int]) -> None:
    x, _ = _batch()
    mean_velocity_pair(roles.teacher, roles.auxiliary, x, 1.0, 0.0, step_size=0.1, **same)
    assert forwards == [2 * ROWS] * 10


@pytest.mark.parametrize("solver", ["euler", "rk4", "bosh3"])
def test_adapters_that_learned_nothing_leave_no_gap(solver: str, digits_teacher: VelocityNetwork) -> None:
    roles = LoRARoles(digits_teacher, rank=4, alpha=4.0)
    x, condition = _batch()
    teacher, auxiliary = mean_velocity_pair(roles.teacher, roles.auxiliary, x, T, R, solver=solver, condition=condition)
    assert float((teacher - auxiliary).norm() / teacher.norm()) <= 1e-6


def test_autocast_roles_stay_one_batch(roles: LoRARoles, forwards: list[int]) -> None:
    x, condition = _batch()
    teacher, auxiliary = (autocast(role, torch.bfloat16) for role in (roles.teacher, roles.auxiliary))
    kwargs: dict[str, Any] = {"steps": 2, "condition": condition}
    pair = mean_velocity_pair(teacher, auxiliary, x, T, R, guidance_scale=2.0, negative_condition=NEGATIVE, **kwargs)
    assert forwards == [3 * ROWS, 3 * (ROWS - 1)]
    assert [u.dtype for u in pair] == [torch.float32] * 2
    exact = mean_velocity(roles.auxiliary, x, T, R, **kwargs)
    error = float((pair[1] - exact).norm() / exact.norm())
    assert 1e-5 < error < 2e-2


def test_only_roles_of_one_backbone_are_paired(roles: LoRARoles, digits_teacher: VelocityNetwork) -> None:
    other = LoRARoles(digits_teacher, rank=1, alpha=1.0)
    assert paired(roles.teacher, roles.auxiliary, guided=False) is not None
    assert paired(roles.teacher, other.auxiliary, guided=False) is None
    assert paired(digits_teacher, roles.auxiliary, guided=False) is None
    assert paired(digits_teacher, digits_teacher, guided=True) is None


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0], ids=["plain", "guided"])
def test_gradients_reach_their_own_role(guidance_scale: float, roles: LoRARoles) -> None:
    x, condition = _batch()
    kwargs: dict[str, Any] = {"steps": 3, "condition": condition, "differentiable": True}
    guidance: dict[str, Any] = {"guidance_scale": guidance_scale, "negative_condition": NEGATIVE}
    weights = roles.parameters("auxiliary")
    teacher, auxiliary = mean_velocity_pair(roles.teacher, roles.auxiliary, x, T, R, **kwargs, **guidance)
    leaked = torch.autograd.grad(teacher.sum(), weights, retain_graph=True, allow_unused=True)
    assert not any(bool(part.any()) for part in leaked if part is not None)
    together = torch.autograd.grad(auxiliary.square().sum(), weights)
    alone = torch.autograd.grad(mean_velocity(roles.auxiliary, x, T, R, **kwargs).square().sum(), weights)
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_pair_that_is_not_finite_names_the_row(roles: LoRARoles) -> None:
    x, condition = _batch()
    roles.parameters("auxiliary")[0].data[:] = torch.nan
    with pytest.raises(FloatingPointError, match=r"row 0 at time 0\.9"):
        mean_velocity_pair(roles.teacher, roles.auxiliary, x, T, R, steps=2, condition=condition)
    teacher, _, stats = mean_velocity_pair(
        roles.teacher, roles.auxiliary, x, T, R, steps=2, condition=condition, return_stats=True
    )
    assert bool(teacher.isfinite().all())
    assert stats.auxiliary.status.tolist() == [3] * ROWS
    assert stats.auxiliary.first_bad == (0, pytest.approx(0.9))


def test_an_empty_pair(roles: LoRARoles) -> None:
    empty = mean_velocity_pair(roles.teacher, roles.auxiliary, torch.empty(0, 1, 8, 8), 1.0, 0.0)
    assert [u.shape for u in empty] == [(0, 1, 8, 8)] * 2
