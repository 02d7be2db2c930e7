"""SenseFlow (arXiv 2506.00523): DMD2 for large flow models, with two additions.

Implicit distribution alignment (IDA): after each update of the student, ``auxiliary <- l auxiliary + (1-l) student``.

Intra-segment guidance (ISG): on the student's step from t_k to t_{k+1}, through a time t_mid inside it, the student's
step is drawn to a step of the teacher to t_mid followed by one of the student::

    x_mid = x - (t_k - t_mid) v_T(x, t_k),   x_tar = x_mid - (t_mid - t_{k+1}) v_S(x_mid, t_mid)
    L_ISG = mean( sqrt((x_gen - stop(x_tar))^2 + 1e-6) - 1e-3 )

The paper looks at decoded pictures through frozen vision models; here the discriminator is that of DMD2, with the hinge
loss and the paper's weight (1 - t)^2, t being the time to which the sample is noised.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from mfd_fast.config import NOT_NEGATIVE, SHARE, one_of
from mfd_fast.methods.base import Actors, Batch, Needs, guided_velocity
from mfd_fast.methods.dmd2 import DistributionMatchingDistillation2, DMD2Options, StudentStep
from mfd_fast.path import expand_times
from mfd_fast.rows import first_rows


@dataclass(frozen=True, kw_only=True)
class SenseFlowOptions(DMD2Options):
    """Options of `SenseFlow`."""

    gan_weight: Annotated[float, "weight of the discriminator in the student's loss (0: none)", NOT_NEGATIVE] = 0.1
    features: Annotated[
        str, "whose features it sees; the auxiliary's learn with it", one_of("teacher", "auxiliary")
    ] = "teacher"
    simulation_share: Annotated[float, "share of the updates with backward simulation, not noised data", SHARE] = 0.5
    ida_decay: Annotated[float, "l: what the auxiliary keeps of itself (1: no IDA)", SHARE] = 0.98
    isg_weight: Annotated[float, "weight of ISG in the student's loss (0: none)", NOT_NEGATIVE] = 0.5
    isg_margin: Annotated[float, "smallest distance of t_mid from both ends", SHARE] = 0.05
    guidance_range: Annotated[list[float], "guidance drawn from [low, high] (empty: distill.guidance_scale)"] = field(
        default_factory=list
    )
    isg_guidance_range: Annotated[list[float], "the same for ISG"] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("guidance_range", "isg_guidance_range"):
            ends = getattr(self, name)
            if ends and (len(ends) != 2 or ends[0] > ends[1]):
                raise self.error(name, f"must be empty or [low, high]; got {ends}")


class SenseFlow(DistributionMatchingDistillation2):
    """See the module."""

    summary = "SenseFlow (arXiv 2506.00523): DMD2 with implicit alignment and intra-segment guidance; data"
    Own = SenseFlowOptions
    own: SenseFlowOptions

    @property
    def needs(self) -> Needs:
        """As DMD2; auxiliary and student must be alike for IDA."""
        guided = bool(self.own.guidance_range or self.own.isg_guidance_range)
        return super().needs._replace(same_weights=self.own.ida_decay < 1, negative_condition=guided)

    def after_student_update(self, auxiliary: list[nn.Parameter], student: list[nn.Parameter]) -> None:
        """IDA."""
        if self.own.ida_decay < 1:
            moved, towards = ([weight.detach() for weight in weights] for weights in (auxiliary, student))
            torch._foreach_lerp_(moved, towards, 1 - self.own.ida_decay)

    def teacher_scale(self, batch: Batch) -> float | Tensor:
        """Drawn for every row where there is a range."""
        return self._scale(batch, self.own.guidance_range)

    def further_losses(self, actors: Actors, batch: Batch, step: StudentStep) -> dict[str, tuple[float, Tensor]]:
        """The generator's loss, and intra-segment guidance."""
        losses = super().further_losses(actors, batch, step)
        if self.own.isg_weight > 0:
            losses["segment_loss"] = (self.own.isg_weight, self._segment_loss(actors, batch, step))
        return losses

    def generator_loss(self, fake: Tensor, t: Tensor) -> Tensor:
        """Hinge, less where the sample is noisier."""
        return -((1 - t).square() * fake).mean()

    def judge_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        """Hinge."""
        return (relu(1 + fake) + relu(1 - real)).mean()

    def _segment_loss(self, actors: Actors, batch: Batch, step: StudentStep) -> Tensor:
        margin = min(self.own.isg_margin, (step.now - step.then) / 2)
        middle = step.then + margin + batch.draws.uniform() * (step.now - step.then - 2 * margin)
        target = self.segment_target(actors, batch, step, middle)
        generated = step.x + (step.now - step.then) / step.now * (step.data - step.x)
        return ((generated - target).square() + 1e-6).sqrt().mean() - 1e-3

    @torch.no_grad()
    def segment_target(self, actors: Actors, batch: Batch, step: StudentStep, middle: Tensor) -> Tensor:
        """``x_tar`` ``[B, ...]`` of the module for the times ``middle`` ``[B]``."""
        x, now = step.x, torch.full_like(middle, step.now)
        velocity = guided_velocity(actors.teacher, x, now, batch, self._scale(batch, self.own.isg_guidance_range))
        x_middle = x - expand_times(step.now - middle, x) * velocity
        rest = actors.student.field(x_middle, middle, **first_rows(batch.condition, len(x))).to(x.dtype)
        return x_middle - expand_times(middle - step.then, x) * rest

    def _scale(self, batch: Batch, ends: list[float]) -> float | Tensor:
        if not ends:
            return self.options.guidance_scale
        low, high = ends
        return low + (high - low) * batch.draws.uniform()
