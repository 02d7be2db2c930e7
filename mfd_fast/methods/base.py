"""What a training objective is: a loss for the auxiliary and a loss for the student, from the same three roles."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from mfd_fast.intervals import LogitNormal, TimeLaw
from mfd_fast.streams import RowDraws
from mfd_fast.student import Student
from mfd_fast.types import Condition, VelocityField


class Actors(NamedTuple):
    """The three roles as a method sees them."""

    teacher: VelocityField
    """The frozen teacher; never receives a gradient."""
    auxiliary: VelocityField
    """Tracks the distribution of the student."""
    student: Student
    """Generates samples from noise."""


@dataclass(frozen=True)
class MethodOptions:
    """What a method may need beyond the roles."""

    guidance_scale: float = 1.0
    """Guidance of the teacher; student and auxiliary have none."""
    pair_law: TimeLaw = field(default_factory=LogitNormal)
    """Law of both ends of the interval in a student update."""
    equal_share: float = 0.0
    """Share of intervals with r == t."""
    auxiliary_law: TimeLaw = field(default_factory=LogitNormal)
    """Law of the time in an auxiliary update."""
    rollout: Mapping[str, Any] = field(default_factory=dict)
    """How mean velocities are integrated: keyword arguments of `mfd_fast.mean_velocity_pair`."""


class Loss(NamedTuple):
    """A loss to back-propagate and what is worth logging about it."""

    value: Tensor
    """Scalar; the mean over all elements of the share."""
    logs: dict[str, Tensor]
    """Detached scalars or short vectors."""


class Method(Protocol):
    """A training objective."""

    def __init__(self, options: MethodOptions) -> None: ...

    def auxiliary_loss(self, actors: Actors, draws: RowDraws, condition: Condition, data: Tensor) -> Loss:
        """The loss of an auxiliary update on fresh student samples ``data`` ``[rows, ...]``, which are constants."""
        ...

    def student_loss(
        self, actors: Actors, draws: RowDraws, condition: Condition, negative_condition: Condition | None
    ) -> Loss:
        """The loss of a student update."""
        ...
