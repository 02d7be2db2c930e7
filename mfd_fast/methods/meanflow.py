"""MeanFlow (arXiv 2505.13447): a network for the mean velocity, from the identity it satisfies.

With u(x, t, r) = 1/(t-r) int_r^t v and x moving with v, ``d/dt [(t-r) u] = v`` gives

    target = v - (t - r) du/dt,     loss = mean over rows of  l / stop((l + offset)^power),   l = |u - stop(target)|^2.

v is the teacher's guided velocity at x_t (distillation) or e - x0 (training on data). At r = t it is flow matching.
Data with guidance: ``v~ = omega v + (1-omega-kappa) u(x,t,t,null) + kappa u(x,t,t,c)``, whose effective scale is
``omega / (1 - kappa)``.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from mfd_fast.config import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE, one_of
from mfd_fast.methods.base import Actors, Batch, Loss, Method, Needs, OwnOptions, guided_velocity, real_samples
from mfd_fast.methods.derivative import DERIVATIVE, tangent, total_derivative
from mfd_fast.path import conditional_velocity, expand_times, interpolate
from mfd_fast.rows import first_rows
from mfd_fast.types import Condition


@dataclass(frozen=True, kw_only=True)
class MeanFlowOptions(OwnOptions):
    """Options of `MeanFlow`."""

    velocity: Annotated[str, "v: the teacher's, or that of the data", one_of("teacher", "data")] = "teacher"
    start: Annotated[str, "weights at the start", one_of("teacher", "random")] = "teacher"
    power: Annotated[float, "p of the adaptive weight (paper: 1, 0.75 on CIFAR-10)", NOT_NEGATIVE] = 0.5
    offset: Annotated[float, "c of the adaptive weight", POSITIVE] = 0.01
    omega: Annotated[float, "share of v in the guided velocity of the data", POSITIVE] = 1.0
    kappa: Annotated[float, "share of u(x, t, t, c) in it", BELOW_ONE] = 0.0
    guidance_low: Annotated[float, "smallest t with omega and kappa", SHARE] = 0.0
    guidance_high: Annotated[float, "largest t with omega and kappa", SHARE] = 1.0
    condition_dropout: Annotated[float, "share of data rows without condition", BELOW_ONE] = 0.1
    derivative: Annotated[str, "how du/dt is computed", DERIVATIVE] = "jvp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.velocity == "teacher" and (self.omega, self.kappa) != (1.0, 0.0):
            problem = f"and omega need velocity = data; got {self.kappa}. distill.guidance_scale guides the teacher"
            raise self.error("kappa", problem)


class MeanFlow(Method):
    """See the module."""

    summary = "MeanFlow (arXiv 2505.13447): a two-time network from data, or with the teacher's velocity; jvp"
    Own = MeanFlowOptions
    own: MeanFlowOptions

    @property
    def needs(self) -> Needs:
        """Data and a second time; the teacher only for its velocity."""
        return Needs(
            teacher=self.own.velocity == "teacher",
            auxiliary=False,
            data=True,
            derivative=self.own.derivative == "jvp",
            second_time=True,
            random_start=self.own.start == "random",
        )

    def student_loss(self, actors: Actors, batch: Batch) -> Loss:
        """The regression on the MeanFlow identity."""
        data = real_samples(batch)
        noise = batch.draws.normal(actors.student.sample_shape)
        t, r = (
            time.to(data.device, non_blocking=True)
            for time in batch.draws.pairs(self.options.pair_law, self.options.equal_share)
        )
        x_t = interpolate(data, noise, t)
        condition: Condition = batch.condition
        if self.own.velocity == "teacher":
            velocity = guided_velocity(actors.teacher, x_t, t, batch, self.options.guidance_scale)
        else:
            condition, dropped = self._dropped(batch)
            r = torch.where(dropped, t, r)
            velocity = self._data_velocity(actors, batch, x_t, t, conditional_velocity(data, noise), dropped)
        field = actors.student.field
        u, derivative = total_derivative(field, x_t, t, velocity, condition, r=r, kind=self.own.derivative)
        target = u + tangent(u, velocity, derivative, t - r)
        prediction = field(x_t, t, **first_rows(condition, len(x_t)), r=r).to(x_t.dtype)
        squares = (prediction - target).square().flatten(1).sum(1)
        logs = {"residual": (squares.detach() / data[0].numel()).mean().sqrt()}
        return Loss(adaptive(squares, self.own.power, self.own.offset), logs)

    def _dropped(self, batch: Batch) -> tuple[Condition, Tensor]:
        """The condition with some rows replaced by the negative one, and which: bool ``[B]``."""
        dropped = batch.draws.uniform() < self.own.condition_dropout
        if batch.negative_condition is None:
            return batch.condition, torch.zeros_like(dropped)
        rows = first_rows(batch.negative_condition, len(dropped))
        changed = {name: torch.where(expand_times(dropped, value), value, batch.condition[name])
                   for name, value in rows.items()}  # fmt: skip
        return {**batch.condition, **changed}, dropped

    @torch.no_grad()
    def _data_velocity(
        self, actors: Actors, batch: Batch, x: Tensor, t: Tensor, velocity: Tensor, dropped: Tensor
    ) -> Tensor:
        """``v~`` of the module where a row is guided, v elsewhere."""
        omega, kappa = self.own.omega, self.own.kappa
        if (omega, kappa) == (1.0, 0.0) or batch.negative_condition is None:
            return velocity
        field, rows = actors.student.field, first_rows(batch.condition, len(x))
        conditional = field(x, t, **rows, r=t).to(x.dtype)
        null = field(x, t, **{**rows, **first_rows(batch.negative_condition, len(x))}, r=t).to(x.dtype)
        guided = omega * velocity + (1 - omega - kappa) * null + kappa * conditional
        inside = (t >= self.own.guidance_low) & (t <= self.own.guidance_high) & ~dropped
        return torch.where(expand_times(inside, x), guided, velocity)


def adaptive(squares: Tensor, power: float, offset: float) -> Tensor:
    """``mean(l / stop((l + offset)^power))`` of the squared errors ``l`` ``[B]``, each summed over a sample."""
    return (squares / (squares.detach() + offset).pow(power)).mean()
