from typing import Any

import pytest
import torch
from torch import nn

from mfd_fast.training.roles import FullRoles


def test_roles_begin_as_the_teacher_and_move_apart() -> None:
    teacher = nn.Linear(2, 2).requires_grad_(False)
    roles = FullRoles(teacher)
    assert roles.teacher is teacher
    x = torch.randn(3, 2)
    assert torch.equal(roles.student(x), teacher(x))
    with torch.no_grad():
        for parameter in roles.parameters("student"):
            parameter.add_(1.0)
    assert torch.equal(roles.auxiliary(x), teacher(x))
    assert not torch.equal(roles.student(x), teacher(x))
    assert all(parameter.requires_grad for role in ("student", "auxiliary") for parameter in roles.parameters(role))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_roles_are_at_least_float32(dtype: torch.dtype) -> None:
    teacher = nn.Linear(2, 2).to(dtype)
    roles = FullRoles(teacher)
    assert teacher.weight.dtype == dtype
    assert {parameter.dtype for parameter in roles.parameters("student")} == {torch.float32}
    assert {parameter.dtype for parameter in FullRoles(nn.Linear(2, 2).double()).parameters("student")} == {
        torch.float64
    }


def test_buffers_belong_to_the_state() -> None:
    roles: Any = FullRoles(nn.BatchNorm1d(2))
    roles.student.running_mean.fill_(3.0)
    state = {name: value.clone() for name, value in roles.state_dict("student").items()}
    other: Any = FullRoles(nn.BatchNorm1d(2))
    other.load_state_dict("student", state)
    assert other.student.running_mean.tolist() == [3.0, 3.0]
    assert other.auxiliary.running_mean.tolist() == [0.0, 0.0]


def test_a_state_that_does_not_fit_is_refused() -> None:
    roles = FullRoles(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the weights do not fit role 'student'"):
        roles.load_state_dict("student", {"weight": torch.zeros(3, 3)})


@pytest.mark.parametrize("role", ["teacher", "Student"])
def test_only_two_roles_are_trained(role: str) -> None:
    with pytest.raises(ValueError, match=f"role must be one of auxiliary, student, got '{role}'"):
        FullRoles(nn.Linear(2, 2)).parameters(role)
