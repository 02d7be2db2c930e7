"""Consistency distillation for flow matching (arXiv 2303.01469, 2406.14548, 2410.11081).

``f(x, t) = x - t F(x, t)`` maps every point of a trajectory of the teacher to its end; F begins as the teacher's
velocity.

Discrete: one step of the teacher from (x_t, t) to r, then ``|f(x_t, t) - stop(f(x_r, r))| / (t - r)``.
Continuous (the limit r -> t, sCM): regression of F on ``v_T - t dF/dt``, with the tangent normalised and warmed up.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from mfd_fast.config import BELOW_ONE, COUNT, NOT_NEGATIVE, POSITIVE, SHARE, one_of
from mfd_fast.methods.base import Actors, Batch, Loss, Method, Needs, OwnOptions, guided_velocity, real_samples
from mfd_fast.methods.derivative import DERIVATIVE, tangent, total_derivative
from mfd_fast.path import data_prediction, expand_times, interpolate
from mfd_fast.rows import first_rows


@dataclass(frozen=True, kw_only=True)
class ConsistencyOptions(OwnOptions):
    """Options of `ConsistencyDistillation`."""

    mode: Annotated[str, "finite steps of the teacher, or their limit", one_of("discrete", "continuous")] = "discrete"
    schedule: Annotated[
        str, "the teacher's step: t to the next of so many bins, a fixed skip, or a shrinking share of t (ECT)",
        one_of("bins", "skip", "ect"),
    ] = "bins"  # fmt: skip
    bins_start: Annotated[int, "bins at the start (doubling until the end)", COUNT] = 10
    bins_end: Annotated[int, "bins at the end", COUNT] = 160
    skip: Annotated[float, "the step of schedule skip", POSITIVE] = 0.02
    stages: Annotated[int, "stages of schedule ect; each halves the step", COUNT] = 8
    teacher_solver: Annotated[str, "the teacher's step", one_of("euler", "heun")] = "heun"
    distance: Annotated[str, "distance of the two ends", one_of("huber", "l2")] = "huber"
    huber: Annotated[float, "c of the pseudo-Huber distance, times the root of the dimension", POSITIVE] = 0.00054
    target_decay: Annotated[float, "decay of the averaged weights of the target (0: the present ones)", BELOW_ONE] = 0.0
    tangent_warmup: Annotated[float, "share of the updates over which dF/dt comes in (continuous)", SHARE] = 0.3
    normaliser: Annotated[float, "c of the normed tangent (continuous)", POSITIVE] = 0.1
    min_time: Annotated[float, "smallest t", NOT_NEGATIVE] = 0.001
    derivative: Annotated[str, "how dF/dt is computed (continuous)", DERIVATIVE] = "jvp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins_end < self.bins_start:
            raise self.error("bins_end", f"must be at least bins_start = {self.bins_start}; got {self.bins_end}")


class ConsistencyDistillation(Method):
    """See the module."""

    summary = "consistency distillation, discrete (CM, LCM, ECT) or continuous (sCM): data, no auxiliary"
    Own = ConsistencyOptions
    own: ConsistencyOptions

    @property
    def needs(self) -> Needs:
        """Data; a derivative in the continuous form."""
        continuous = self.own.mode == "continuous"
        return Needs(
            auxiliary=False,
            data=True,
            derivative=continuous and self.own.derivative == "jvp",
            renoising=True,
            target_decay=0.0 if continuous else self.own.target_decay,
        )

    def student_loss(self, actors: Actors, batch: Batch) -> Loss:
        """The distance of two ends, or the regression that is its limit."""
        data = real_samples(batch)
        noise = batch.draws.normal(actors.student.sample_shape)
        t = batch.draws.times(self.options.pair_law).clamp(min=self.own.min_time).to(data.device, non_blocking=True)
        if self.own.mode == "continuous":
            return self._continuous(actors, batch, interpolate(data, noise, t), t)
        if self.own.schedule == "bins":  # t is the upper end of its bin
            bins = self._bins(batch.progress)
            t = (t * bins).ceil().clamp(min=1) / bins
        return self._discrete(actors, batch, interpolate(data, noise, t), t)

    def _discrete(self, actors: Actors, batch: Batch, x_t: Tensor, t: Tensor) -> Loss:
        r = self.step_end(t, batch.progress)
        x_r = self._teacher_step(actors, batch, x_t, t, r)
        condition, field = first_rows(batch.condition, len(x_t)), actors.student.field
        devices = [x_t.device] if x_t.device.type == "cuda" else []
        with actors.target_weights(), torch.no_grad(), torch.random.fork_rng(devices=devices):  # the same dropout below
            target = data_prediction(x_r, r, field(x_r, r, **condition).to(x_t.dtype))
        end = data_prediction(x_t, t, field(x_t, t, **condition).to(x_t.dtype))
        squares = (end - target).square().flatten(1).sum(1)
        distance = squares
        if self.own.distance == "huber":
            c = self.own.huber * x_t[0].numel() ** 0.5
            distance = (squares + c**2).sqrt() - c
        logs = {"residual": (squares.detach() / x_t[0].numel()).mean().sqrt(), "step": (t - r).mean()}
        return Loss((distance / (t - r)).mean(), logs)

    def _continuous(self, actors: Actors, batch: Batch, x_t: Tensor, t: Tensor) -> Loss:
        velocity = guided_velocity(actors.teacher, x_t, t, batch, self.options.guidance_scale)
        field = actors.student.field
        value, derivative = total_derivative(field, x_t, t, velocity, batch.condition, kind=self.own.derivative)
        share = min(1.0, batch.progress / self.own.tangent_warmup) if self.own.tangent_warmup > 0 else 1.0
        step = tangent(value, velocity, derivative, t, share=share, normaliser=self.own.normaliser)
        prediction = field(x_t, t, **first_rows(batch.condition, len(x_t))).to(x_t.dtype)
        loss = (prediction - (value + step)).square().flatten(1).sum(1).mean()
        return Loss(loss, {"residual": tangent(value, velocity, derivative, t).square().mean().sqrt()})

    def step_end(self, t: Tensor, progress: float) -> Tensor:
        """The end r < t ``[B]`` of the teacher's step from ``t`` ``[B]`` after this share of the updates."""
        if self.own.schedule == "bins":
            step = torch.full_like(t, 1 / self._bins(progress))
        elif self.own.schedule == "skip":
            step = torch.full_like(t, self.own.skip)
        else:
            stage = min(self.own.stages - 1, int(progress * self.own.stages))
            rest = max(0.5 ** (stage + 1), 1e-3)  # 1 - q with q at most 0.999
            step = t * rest * (1 + 8 * torch.sigmoid(-t))
        return (t - step).clamp(min=0)

    def _bins(self, progress: float) -> int:
        doublings = int(progress * (1 + math.log2(self.own.bins_end / self.own.bins_start)))
        bins: int = self.own.bins_start * 2**doublings
        return min(self.own.bins_end, bins)

    def _teacher_step(self, actors: Actors, batch: Batch, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        step = expand_times(t - r, x)
        velocity = guided_velocity(actors.teacher, x, t, batch, self.options.guidance_scale)
        if self.own.teacher_solver == "euler":
            return x - step * velocity
        later = guided_velocity(actors.teacher, x - step * velocity, r, batch, self.options.guidance_scale)
        return x - step * (velocity + later) / 2
