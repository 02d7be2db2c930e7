"""Mean Flow Distillation (arXiv 2606.11155).

Student update: with x_t = (1 - t) G(z) + t e and both fields integrated from x_t to r::

    gradient = E[ <u_teacher - u_auxiliary, d x_t / d theta> ]            (the Jacobian of u omitted)
    loss     = 1/2 mean( (x_t - stop(x_t - (u_teacher - u_auxiliary)))^2 )

which has that gradient and the value 1/2 mean |u_teacher - u_auxiliary|^2. Descent raises the student's sample towards
the teacher's data prediction. Auxiliary update: flow matching on the student's samples, without guidance.
"""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from mfd_fast.mean_velocity import mean_velocity_pair
from mfd_fast.methods.base import Actors, Batch, Loss, Method, fresh_samples, spread
from mfd_fast.path import conditional_velocity, interpolate
from mfd_fast.types import Condition, Status, VelocityField

NUM_TIME_BINS = 10


class MeanFlowDistillation(Method):
    """The method of the package; see the module."""

    summary = "Mean Flow Distillation (arXiv 2606.11155): mean velocities of teacher and auxiliary; no data"

    def auxiliary_loss(self, actors: Actors, batch: Batch, samples: Tensor) -> Loss:
        """Flow matching of the auxiliary on fresh student samples."""
        noise, t = batch.draws.normal(actors.student.sample_shape), batch.draws.times(self.options.auxiliary_law)
        t = t.to(samples.device, non_blocking=True)
        return Loss(flow_matching_loss(actors.auxiliary, samples, noise, t, batch.condition), {})

    def student_loss(self, actors: Actors, batch: Batch) -> Loss:
        """The surrogate whose gradient is the paper's; the two mean velocities are constants."""
        noise = batch.draws.normal(actors.student.sample_shape)
        path_noise = batch.draws.normal(actors.student.sample_shape)
        t, r = batch.draws.pairs(self.options.pair_law, self.options.equal_share)
        data = fresh_samples(actors, batch, noise, with_gradient=True)
        x_t = interpolate(data, path_noise, t.to(data.device, non_blocking=True))
        u_teacher, u_auxiliary, stats = mean_velocity_pair(
            actors.teacher,
            actors.auxiliary,
            # A sample that is not finite makes the loss NaN by itself and the update is skipped.
            x_t.detach().nan_to_num(0.0, 0.0, 0.0),
            t,
            r,
            condition=batch.condition,
            negative_condition=batch.negative_condition,
            guidance_scale=self.options.guidance_scale,
            return_stats=True,
            check_finite=False,
            **self.options.rollout,
        )
        gap = u_teacher - u_auxiliary
        ended_early = (stats.teacher.status != Status.SUCCESS).to(gap.device, non_blocking=True)
        logs = {
            "velocity_gap": gap.square().mean().sqrt(),
            "velocity_gap_bins": rms_per_bin(gap, t, NUM_TIME_BINS),
            "evaluations": (stats.teacher.evaluations + stats.auxiliary.evaluations).double().mean(),
            "unfinished": (ended_early | ~gap.isfinite().flatten(1).all(1)).double().mean(),
            **spread(data),
        }
        return Loss(surrogate_loss(x_t, gap), logs)


def surrogate_loss(x_t: Tensor, gap: Tensor) -> Tensor:
    """``1/2 mean((x_t - stop(x_t - gap))^2)``: gradient ``gap / (B d)`` with respect to x_t, value ``mean(gap^2) / 2``.

    Args:
        x_t: ``[B, ...]``, with the student's graph.
        gap: ``[B, ...]``, u_teacher - u_auxiliary, a constant.

    Raises:
        ValueError: the two have different shapes.
    """
    if gap.shape != x_t.shape:
        raise ValueError(f"gap must have the shape of x_t, {tuple(x_t.shape)}, got {tuple(gap.shape)}")
    return 0.5 * mse_loss(x_t, (x_t - gap).detach())


def flow_matching_loss(field: VelocityField, data: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """``mean((field((1-t) data + t noise, t) - (noise - data))^2)``; data and noise ``[B, ...]``, t ``[B]``."""
    velocity = field(interpolate(data, noise, t), t, **condition)
    return mse_loss(velocity.to(data.dtype), conditional_velocity(data, noise))


def rms_per_bin(gap: Tensor, t: Tensor, bins: int) -> Tensor:
    """Root mean square of ``gap`` ``[B, ...]`` over equal bins of t in [0, 1]: ``[bins]``, NaN where a bin is empty."""
    power = gap.square().flatten(1).mean(1)
    index = (t * bins).long().clamp(0, bins - 1)
    # The times are on the CPU and the gap may not be: nothing is brought back from the device.
    rows = torch.bincount(index, minlength=bins)
    index, rows = (part.to(gap.device, non_blocking=True) for part in (index, rows))
    return (power.new_zeros(bins).index_add_(0, index, power) / rows).sqrt()
