"""Conditions are prepared once per rollout, all fields of a backbone together, and handed on by every wrapper."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast import mean_velocity, mean_velocity_pair
from mfd_fast.fields import autocast, from_data_prediction, from_noise_prediction, negated, reversed_time, scaled_time
from mfd_fast.student import Student
from mfd_fast.types import Condition, ConditionGroup, PreparesConditions


class Preparing:
    """The velocity ``-x * strength^2``; the square is what it prepares."""

    def __init__(self) -> None:
        self.prepared: list[int] = []
        """Groups of each preparation."""

    def __call__(self, x: Tensor, t: Tensor, strength: Tensor | None = None, square: Tensor | None = None) -> Tensor:
        if square is None:
            assert strength is not None
            square = strength.square()
        return -x * square[:, None]

    def prepare_conditions(self, groups: Sequence[ConditionGroup]) -> list[Condition]:
        self.prepared.append(len(groups))
        return [{"square": condition["strength"].square()} for _, condition in groups]


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
STRENGTH = torch.tensor([0.5, 1.0, 1.5, 2.0])


WRAPPERS: dict[str, Any] = {
    "bare": lambda field: field,
    "reversed time": reversed_time,
    "negated": negated,
    "scaled time": lambda field: scaled_time(field, 1000.0),
    "data prediction": from_data_prediction,
    "noise prediction": from_noise_prediction,
    "autocast": lambda field: autocast(field, torch.bfloat16),
    "two wrappers": lambda field: reversed_time(scaled_time(field, 10.0)),
}


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_once_per_rollout_with_the_same_result(wrapper: str, guided: bool) -> None:
    field = Preparing()
    arguments: dict[str, Any] = {"condition": {"strength": STRENGTH}}
    if guided:
        arguments |= {"negative_condition": {"strength": torch.tensor([0.1])}, "guidance_scale": 3.0}
    t, r = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0.1, 0.5, 0.2, 0.6])
    ours = mean_velocity(WRAPPERS[wrapper](field), X, t, r, **arguments)
    assert field.prepared == [2 if guided else 1]
    wrapped = WRAPPERS[wrapper](field)
    theirs = mean_velocity(lambda x, t, **rows: wrapped(x, t, **rows), X, t, r, **arguments)
    assert field.prepared == [2 if guided else 1]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", [4, 0])
def test_both_fields_of_a_pair_that_share_no_backbone(rows: int) -> None:
    teacher, auxiliary = Preparing(), Preparing()
    negative: dict[str, Any] = {"negative_condition": {"strength": torch.tensor([0.1])}, "guidance_scale": 3.0}
    condition = {"strength": STRENGTH[:rows]}
    found = mean_velocity_pair(teacher, auxiliary, X[:rows], 0.9, 0.1, condition=condition, **negative)
    assert (teacher.prepared, auxiliary.prepared) == (([2], [1]) if rows else ([], []))
    for velocity, guidance in zip(found, (negative, {}), strict=True):
        alone = mean_velocity(Preparing(), X[:rows], 0.9, 0.1, condition=condition, **guidance)
        assert torch.equal(velocity, alone)


def test_rows_that_end_early_take_their_share_along() -> None:
    """Bad rows are found again in the prepared conditions too."""
    strength = STRENGTH.clone()
    strength[2] = float("inf")
    with pytest.raises(FloatingPointError, match=r"row 2 at time 0\.7"):
        mean_velocity(Preparing(), X, torch.tensor([0.9, 0.8, 0.7, 0.6]), 0.1, condition={"strength": strength})


def test_a_student_prepares_once_with_its_gradient() -> None:
    field, strength = Preparing(), STRENGTH.clone().requires_grad_()
    gradients = []
    for one in (field, lambda x, t, **rows: Preparing()(x, t, **rows)):
        samples = Student(one, (3,), 3, grad_steps=2).generate(X, {"strength": strength}, with_gradient=True)
        gradients.append(torch.autograd.grad(samples.sum(), strength)[0])
    assert field.prepared == [1]
    torch.testing.assert_close(*gradients)


def test_a_gradient_only_where_one_is_wanted() -> None:
    strength = STRENGTH.clone().requires_grad_()
    condition = {"strength": strength}
    assert not mean_velocity(Preparing(), X, 0.9, 0.1, steps=2, condition=condition).requires_grad
    u = mean_velocity(Preparing(), X, 0.9, 0.1, steps=2, condition=condition, differentiable=True)
    assert torch.autograd.grad(u.sum(), strength)[0].abs().min() > 0


def test_the_protocol() -> None:
    assert isinstance(Preparing(), PreparesConditions)
    assert not isinstance(lambda x, t: x, PreparesConditions)
