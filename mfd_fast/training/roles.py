"""Teacher, auxiliary and student: three networks, one frozen backbone with low-rank roles, or some of each."""

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mfd_fast.types import VelocityField

TRAINED = ("auxiliary", "student")


class Roles(Protocol):
    """The three fields and the weights of the two that are trained."""

    @property
    def teacher(self) -> VelocityField:
        """The frozen teacher."""
        ...

    @property
    def auxiliary(self) -> VelocityField:
        """The field that tracks the student."""
        ...

    @property
    def student(self) -> VelocityField:
        """The student's network."""
        ...

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The trained weights of a role."""
        ...

    def state_dict(self, role: str) -> dict[str, Tensor]:
        """What `load_state_dict` needs to restore the role, by name."""
        ...

    def load_state_dict(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Restore a role; ValueError when names or shapes differ."""
        ...


class FullRoles:
    """Auxiliary and student are full copies of the teacher, in float32 or wider; the teacher is never changed.

    Args:
        teacher: the frozen teacher.
        trained: the roles to make; the field of one that is not is the teacher itself.
        student: what the student begins as, if not as the teacher.
    """

    def __init__(
        self, teacher: nn.Module, trained: Sequence[str] = TRAINED, *, student: nn.Module | None = None
    ) -> None:
        self.teacher = teacher
        self.auxiliary = _trainable_copy(teacher) if "auxiliary" in trained else teacher
        self.student = _trainable_copy(teacher if student is None else student) if "student" in trained else teacher
        self._trained = tuple(trained)

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The trained weights of a role."""
        return list(self._module(role).parameters())

    def state_dict(self, role: str) -> dict[str, Tensor]:
        """Weights and buffers of a role by name."""
        return dict(self._module(role).state_dict())

    def load_state_dict(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Copy weights and buffers of a role in; ValueError when names or shapes differ."""
        try:
            self._module(role).load_state_dict(dict(state))
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit role {role!r}: {error}") from error

    def _module(self, role: str) -> nn.Module:
        modules = {"auxiliary": self.auxiliary, "student": self.student}
        if role not in self._trained:
            raise ValueError(f"role must be one of {', '.join(self._trained)}, got {role!r}")
        return modules[role]


class UnlikeRoles:
    """An auxiliary and a student that are trained in different ways, such as whole and low-rank.

    Args:
        auxiliary: where the auxiliary is from.
        student: where the student and the teacher are from.
    """

    def __init__(self, auxiliary: Roles, student: Roles) -> None:
        self.parts = {"auxiliary": auxiliary, "student": student}
        """By role where it is from."""
        self.teacher, self.auxiliary, self.student = student.teacher, auxiliary.auxiliary, student.student

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The trained weights of a role."""
        return self._part(role).parameters(role)

    def state_dict(self, role: str) -> dict[str, Tensor]:
        """The state of a role, as its part has it."""
        return self._part(role).state_dict(role)

    def load_state_dict(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Restore a role; ValueError when names or shapes differ."""
        self._part(role).load_state_dict(role, state)

    def _part(self, role: str) -> Roles:
        if role not in self.parts:
            raise ValueError(f"role must be one of {', '.join(self.parts)}, got {role!r}")
        return self.parts[role]


def _trainable_copy(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module).requires_grad_(True)
    low = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in copied.parameters())
    return copied.float() if low else copied
