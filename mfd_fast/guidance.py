"""Classifier-free guidance as a wrapper: a field and a negative condition give one field (Ho & Salimans 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfd_fast.path import expand_times
from mfd_fast.prepared_conditions import prepared
from mfd_fast.rows import can_concatenate, concatenate, first_rows
from mfd_fast.types import Condition, ConditionGroup, RowGroup, VelocityField, shares_backbone


class Guidance(NamedTuple):
    """The arguments of guidance."""

    negative_condition: Condition | None
    scale: float | Tensor
    interval: Sequence[float] | None
    every: int


class PreparesBoth:
    """For guided fields: what the field prepares of both conditions, together."""

    field: VelocityField

    def prepare_conditions(self, groups: Sequence[ConditionGroup]) -> list[Condition]:
        """As `mfd_fast.types.PreparesConditions`, for conditions as `guide` returns them."""
        return [self._prepared(arguments) for _, arguments in groups]

    def _prepared(self, arguments: Condition) -> Condition:
        condition = arguments["condition"]
        negative = complete_negative(condition, arguments["negative_condition"])
        both = prepared([(self.field, condition), (self.field, negative)])
        return {**arguments, "condition": both[0], "negative_condition": both[1]}


@dataclass(frozen=True)
class Guided(PreparesBoth):
    """``v = v_negative + guidance_scale * (v_condition - v_negative)``.

    Both evaluations run as one batch of 2n rows where the two conditions allow it, else one after the other.
    """

    field: VelocityField

    def __call__(
        self, x: Tensor, t: Tensor, *, condition: Condition, negative_condition: Condition, guidance_scale: Tensor
    ) -> Tensor:
        """The guided velocity; x ``[n, ...]``, t ``[n]``, guidance_scale ``[n]`` (or ``[1]``)."""
        conditional, negative = self.velocities(x, t, condition, negative_condition)
        return combine(conditional, negative, guidance_scale)

    def velocities(
        self, x: Tensor, t: Tensor, condition: Condition, negative_condition: Condition
    ) -> tuple[Tensor, Tensor]:
        """The conditional and the negative velocity, ``[n, ...]`` each; x ``[n, ...]``, t ``[n]``."""
        rows, negative = x.shape[0], complete_negative(condition, negative_condition)
        if shares_backbone(self.field):
            conditional, negative_velocity = self.field.evaluate_groups(
                [RowGroup(self.field, x, t, condition), RowGroup(self.field, x, t, negative)]
            )
            return conditional, negative_velocity
        condition, negative = first_rows(condition, rows), first_rows(negative, rows)
        if not can_concatenate([condition, negative]):
            velocities = (self.field(x, t, **part) for part in (condition, negative))
            conditional, negative_velocity = (check_velocity(velocity, x.shape) for velocity in velocities)
            return conditional, negative_velocity
        both = self.field(torch.cat([x, x]), torch.cat([t, t]), **concatenate([condition, negative]))
        check_velocity(both, torch.Size([2 * rows, *x.shape[1:]]))
        return both[:rows], both[rows:]


def check_velocity(velocity: Any, shape: torch.Size) -> Tensor:
    """``velocity`` if it is floating point and of the shape of the x its field got; TypeError or ValueError if not."""
    if not isinstance(velocity, Tensor):
        raise TypeError(f"field must return a tensor of shape {tuple(shape)}, got {type(velocity).__name__}")
    if velocity.shape != shape:
        raise ValueError(f"field must return the shape of x, expected {tuple(shape)}, got {tuple(velocity.shape)}")
    if not velocity.is_floating_point():
        raise TypeError(f"field must return floating point, got {velocity.dtype}")
    return velocity


def complete_negative(condition: Condition, negative_condition: Condition) -> dict[str, Any]:
    """The negative condition with what it does not name taken from the condition."""
    return {**condition, **negative_condition}


def combine(conditional: Tensor, negative: Tensor, guidance_scale: Tensor) -> Tensor:
    """``negative + guidance_scale * (conditional - negative)`` computed in at least float32."""
    dtype = torch.promote_types(conditional.dtype, guidance_scale.dtype)
    conditional, negative = conditional.to(dtype), negative.to(dtype)
    return negative + expand_times(guidance_scale, conditional) * (conditional - negative)


def guide(
    field: VelocityField,
    condition: Condition,
    negative_condition: Condition | None,
    guidance_scale: float | Tensor,
    like: Tensor,
) -> tuple[VelocityField, Condition, int]:
    """The field and condition to integrate under guidance, and the network rows one evaluation costs.

    Args:
        field: the field to guide.
        condition: its condition.
        negative_condition: what is pushed away from; names it lacks are taken from ``condition``.
        guidance_scale: 1.0 is off and skips the negative evaluation; a number, a 0-d tensor or ``[B]``.
        like: the state; gives dtype and device to the scale.

    Raises:
        TypeError: a scale that is not a number or a tensor.
        ValueError: guidance without a negative condition, a scale that is not finite, or of the wrong shape.
    """
    if not isinstance(guidance_scale, Tensor):
        if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, int | float):
            raise TypeError(f"guidance_scale must be a number or a tensor, got {type(guidance_scale).__name__}")
        if guidance_scale == 1.0:
            return field, condition, 1
        guidance_scale = torch.tensor([guidance_scale], dtype=torch.float64, device="cpu")
    if guidance_scale.dim() == 0:
        guidance_scale = guidance_scale.expand(1)
    if guidance_scale.shape not in ((1,), (like.shape[0],)):
        raise ValueError(
            f"guidance_scale must be a number or have shape ({like.shape[0]},), got shape {tuple(guidance_scale.shape)}"
        )
    if guidance_scale.device.type == "cpu" and not bool(guidance_scale.isfinite().all()):
        raise ValueError(f"guidance_scale must be finite, got {guidance_scale.tolist()}")
    if negative_condition is None:
        raise ValueError("guidance_scale other than 1.0 needs negative_condition (what to push away from), got None")
    arguments = {
        "condition": dict(condition),
        "negative_condition": dict(negative_condition),
        "guidance_scale": guidance_scale.to(like.device, like.dtype, non_blocking=True),
    }
    return Guided(field), arguments, 2


@dataclass(frozen=True)
class FixedGuidance:
    """A field with a negative condition and a scale of its own, for samplers that know nothing of guidance."""

    field: VelocityField
    negative_condition: Condition
    guidance_scale: float

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The guided velocity at ``x`` ``[B, ...]``, ``t`` ``[B]``."""
        guided, arguments, _ = guide(self.field, condition, self.negative_condition, self.guidance_scale, x)
        velocity: Tensor = guided(x, t, **arguments)
        return velocity
