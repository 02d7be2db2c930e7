"""Reflow (rectified flow, arXiv 2209.03003): flow matching on the teacher's own pairs of noise and sample.

``x0 = ODE_T(z)`` by the rollout settings, guided; loss ``|v(x_t, t) - (z - x0)|^2`` at ``x_t = (1-t) x0 + t z``. The
learned trajectories do not cross, so they are straighter and one step errs less. From ``one_step_from`` on, t = 1 for
a student of one step, which is fitted to the pairs themselves.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from mfd_fast.config import SHARE
from mfd_fast.mean_velocity import integrate
from mfd_fast.methods.base import Actors, Batch, Loss, Method, Needs, OwnOptions
from mfd_fast.methods.mfd import flow_matching_loss
from mfd_fast.rows import first_rows


@dataclass(frozen=True, kw_only=True)
class ReflowOptions(OwnOptions):
    """Options of `Reflow`."""

    one_step_from: Annotated[float, "share of the updates after which t = 1 (1: never)", SHARE] = 0.5


class Reflow(Method):
    """See the module."""

    summary = "Reflow (arXiv 2209.03003): flow matching on the teacher's pairs, then their one-step map; no data"
    Own = ReflowOptions
    own: ReflowOptions

    @property
    def needs(self) -> Needs:
        """The teacher alone."""
        return Needs(auxiliary=False)

    def student_loss(self, actors: Actors, batch: Batch) -> Loss:
        """Flow matching between noise and where the teacher takes it."""
        noise = batch.draws.normal(actors.student.sample_shape)
        t = batch.draws.times(self.options.pair_law).to(noise.device, non_blocking=True)
        if actors.student.steps == 1 and batch.progress >= self.own.one_step_from:
            t = torch.ones_like(t)
        data = self.sample_teacher(actors, batch, noise)
        rows = first_rows(batch.condition, len(noise))
        return Loss(flow_matching_loss(actors.student.field, data, noise, t, rows), {})

    @torch.no_grad()
    def sample_teacher(self, actors: Actors, batch: Batch, noise: Tensor) -> Tensor:
        """Where the teacher's flow takes ``noise`` ``[B, ...]``."""
        rollout = {name: value for name, value in self.options.rollout.items() if not name.startswith("auxiliary_")}
        end: Tensor = integrate(
            actors.teacher,
            noise,
            1.0,
            0.0,
            condition=batch.condition,
            negative_condition=batch.negative_condition,
            guidance_scale=self.options.guidance_scale,
            **rollout,
        )
        return end
