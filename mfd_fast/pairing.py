"""Teacher and auxiliary that share a backbone, integrated as one batch.

Both start from the same point and take the same steps, so the pair is one integration whose state is
``[B, 2, ...]`` (teacher, auxiliary) and whose field evaluates all rows of both in one forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfd_fast.guidance import combine, complete_negative
from mfd_fast.prepared_conditions import prepared
from mfd_fast.types import Condition, ConditionGroup, RowGroup, SharedBackbone, VelocityField, shares_backbone


def paired(teacher: VelocityField, auxiliary: VelocityField, *, guided: bool) -> "PairedField | None":
    """Both as one field if they are roles of the same backbone, else None."""
    if shares_backbone(teacher) and shares_backbone(auxiliary) and teacher.backbone is auxiliary.backbone:
        return PairedField(teacher, auxiliary, guided)
    return None


@dataclass(frozen=True)
class PairedField:
    """The velocity ``[n, 2, ...]`` of the pair; the teacher's part is guided or not."""

    teacher: SharedBackbone
    auxiliary: SharedBackbone
    guided: bool

    def __call__(self, x: Tensor, t: Tensor, *, teacher: Condition, auxiliary: Condition) -> Tensor:
        """x ``[n, 2, ...]``, t ``[n]``; conditions as `mfd_fast.guidance.guide` returns them."""
        x_teacher, x_auxiliary = x.unbind(1)
        last = RowGroup(self.auxiliary, x_auxiliary, t, auxiliary)
        if not self.guided:
            both = self.teacher.evaluate_groups([RowGroup(self.teacher, x_teacher, t, teacher), last])
            return torch.stack(both, 1)
        condition = teacher["condition"]
        negative = complete_negative(condition, teacher["negative_condition"])
        conditional, unconditional, velocity = self.teacher.evaluate_groups(
            [RowGroup(self.teacher, x_teacher, t, part) for part in (condition, negative)] + [last]
        )
        guided = combine(conditional, unconditional, teacher["guidance_scale"])
        return torch.stack([guided, velocity.to(guided.dtype)], 1)

    def prepare_conditions(self, groups: Sequence[ConditionGroup]) -> list[Condition]:
        """All conditions of the pair as its backbone prepares them, together."""
        return [self._prepared(**condition) for _, condition in groups]

    def _prepared(self, teacher: Condition, auxiliary: Condition) -> Condition:
        last = (self.auxiliary, auxiliary)
        if not self.guided:
            both = prepared([(self.teacher, teacher), last])
            return {"teacher": both[0], "auxiliary": both[1]}
        condition = teacher["condition"]
        negative = complete_negative(condition, teacher["negative_condition"])
        three = prepared([(self.teacher, condition), (self.teacher, negative), last])
        guided = {**teacher, "condition": three[0], "negative_condition": three[1]}
        return {"teacher": guided, "auxiliary": three[2]}
