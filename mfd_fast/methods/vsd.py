"""Variational score distillation / Diff-Instruct for flow matching (arXiv 2305.16213, 2305.18455).

Minimises ``int w(t) KL(q_t || p_t) dt`` between the noised laws of student and teacher. With x_t = (1 - t) G(z) + t e,
``score_A - score_T = ((1-t)/t) (v_T - v_A)`` and ``d x_t = (1-t) dG`` the gradient is

    E[ weight(t) <v_T(x_t, t) - v_A(x_t, t), dG / d theta> ],      weight = (1-t)^2 / t for the KL itself.

With weight 1 - t it is Mean Flow Distillation with r = t: one evaluation of each field in place of a rollout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from mfd_fast.config import BELOW_ONE, one_of
from mfd_fast.methods.base import Actors, Batch, Loss, OwnOptions, fresh_samples, guided_velocity, spread
from mfd_fast.methods.mfd import NUM_TIME_BINS, MeanFlowDistillation, rms_per_bin, surrogate_loss
from mfd_fast.path import expand_times, interpolate

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda t: (1 - t).square() / t,
    "velocity": lambda t: 1 - t,
    "x0": lambda t: t,
    "const": torch.ones_like,
}
"""Weight of ``v_T - v_A`` in the student's gradient, by name: of the KL; of MFD; of data predictions; none."""


@dataclass(frozen=True, kw_only=True)
class VSDOptions(OwnOptions):
    """Options of `VariationalScoreDistillation`."""

    weight: Annotated[str, "weight of v_T - v_A over t", one_of(*WEIGHTS)] = "velocity"
    min_time: Annotated[float, "smallest t in the weight, which for kl grows like 1 / t", BELOW_ONE] = 0.02


class VariationalScoreDistillation(MeanFlowDistillation):
    """See the module; the auxiliary's update is that of Mean Flow Distillation."""

    summary = "variational score distillation / Diff-Instruct: velocities of teacher and auxiliary; no data"
    Own = VSDOptions
    own: VSDOptions

    def student_loss(self, actors: Actors, batch: Batch) -> Loss:
        """The surrogate whose gradient is the weighted difference of the two velocities."""
        noise = batch.draws.normal(actors.student.sample_shape)
        path_noise = batch.draws.normal(actors.student.sample_shape)
        t = batch.draws.times(self.options.pair_law)
        data = fresh_samples(actors, batch, noise, with_gradient=True)
        there = t.to(data.device, non_blocking=True)
        x_t = interpolate(data.detach(), path_noise, there)
        teacher, auxiliary = both_velocities(actors, batch, x_t, there, self.options.guidance_scale)
        gap = teacher - auxiliary
        weight = WEIGHTS[self.own.weight](t.clamp(min=self.own.min_time)).to(data.device, non_blocking=True)
        return Loss(surrogate_loss(data, expand_times(weight, gap) * gap), gap_logs(gap, t) | spread(data))


def both_velocities(actors: Actors, batch: Batch, x: Tensor, t: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """``v_T``, guided by ``scale``, and ``v_A`` at ``x`` ``[B, ...]``, ``t`` ``[B]``, without gradient."""
    teacher = guided_velocity(actors.teacher, x, t, batch, scale)
    return teacher, guided_velocity(actors.auxiliary, x, t, batch, 1.0)


def gap_logs(gap: Tensor, t: Tensor) -> dict[str, Tensor]:
    """The root mean square of ``gap``, over all and by bins of ``t`` on the CPU."""
    return {"velocity_gap": gap.square().mean().sqrt(), "velocity_gap_bins": rms_per_bin(gap, t, NUM_TIME_BINS)}
