from typing import Any

import pytest
import torch
from torch import nn

from mfd_fast.models.lora import LoRARoles
from mfd_fast.training.roles import FullRoles, UnlikeRoles


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


def test_a_whole_auxiliary_beside_a_low_rank_student() -> None:
    """Each role is that of its part; nothing is made for the role that a part does not have."""
    teacher = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)
    whole, low_rank = FullRoles(teacher, ["auxiliary"]), LoRARoles(teacher, rank=1, alpha=1.0, roles=["student"])
    roles = UnlikeRoles(auxiliary=whole, student=low_rank)
    assert whole.student is teacher
    assert list(roles.state_dict("auxiliary")) == ["0.weight", "0.bias"]
    assert list(roles.state_dict("student")) == ["0.lora_A", "0.lora_B"]
    assert [parameter.shape for parameter in roles.parameters("student")] == [(1, 3), (3, 1)]
    roles.load_state_dict("auxiliary", {"0.weight": torch.eye(3), "0.bias": torch.ones(3)})
    roles.load_state_dict("student", {"0.lora_A": torch.ones(1, 3), "0.lora_B": torch.ones(3, 1)})
    x = torch.randn(2, 3)
    torch.testing.assert_close(whole.auxiliary(x), x + 1)
    torch.testing.assert_close(low_rank.merged("student")(x), teacher(x) + x.sum(1, keepdim=True))
    assert (roles.auxiliary, roles.student.role, roles.teacher.role) == (whole.auxiliary, "student", None)
    with pytest.raises(ValueError, match="role must be one of auxiliary, student, got 'teacher'"):
        roles.parameters("teacher")
