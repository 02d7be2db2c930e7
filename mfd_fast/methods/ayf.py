"""Align Your Flow (arXiv 2506.14603), Eulerian map distillation in its continuous limit.

The two-time map ``Phi(x, t, s) = x - (t - s) u(x, t, s)`` of the teacher's flow. With v the teacher's guided velocity,

    g = (v - u) - rho (t - s) du/dt,    g <- g / (|g| + c),    loss = |u - stop(u + g)|^2

rho rises from 0 to 0.99: the part 1 - rho pulls to straight trajectories while the derivative cannot be trusted yet.
With rho = 1 and g as it is, this is MeanFlow with the teacher's velocity; with s = 0, continuous consistency
distillation. Autoguidance by a weak teacher, and the adversarial stage of the paper, are not part of it.
"""

from dataclasses import dataclass
from typing import Annotated

from mfd_fast.config import POSITIVE, SHARE
from mfd_fast.intervals import LogitNormal
from mfd_fast.methods.base import Actors, Batch, Loss, Method, Needs, OwnOptions, guided_velocity, real_samples
from mfd_fast.methods.derivative import DERIVATIVE, tangent, total_derivative
from mfd_fast.path import interpolate
from mfd_fast.rows import first_rows


@dataclass(frozen=True, kw_only=True)
class AlignYourFlowOptions(OwnOptions):
    """Options of `AlignYourFlow`."""

    gap_mean: Annotated[float, "mean of logit(t - s)"] = -0.8
    gap_std: Annotated[float, "standard deviation of logit(t - s)", POSITIVE] = 1.6
    tangent_warmup: Annotated[float, "share of the updates over which rho rises", SHARE] = 0.1
    tangent_max: Annotated[float, "largest rho", SHARE] = 0.99
    normaliser: Annotated[float, "c of the normed tangent", POSITIVE] = 0.1
    derivative: Annotated[str, "how du/dt is computed", DERIVATIVE] = "jvp"


class AlignYourFlow(Method):
    """See the module."""

    summary = "Align Your Flow (arXiv 2506.14603): the teacher's flow map by a two-time network; data, jvp"
    Own = AlignYourFlowOptions
    own: AlignYourFlowOptions

    @property
    def needs(self) -> Needs:
        """Data, a second time and a derivative."""
        return Needs(auxiliary=False, data=True, derivative=self.own.derivative == "jvp", second_time=True)

    def student_loss(self, actors: Actors, batch: Batch) -> Loss:
        """The regression on the normed tangent; its value says little, ``residual`` in the log is the error."""
        data = real_samples(batch)
        noise = batch.draws.normal(actors.student.sample_shape)
        gap = batch.draws.times(LogitNormal(self.own.gap_mean, self.own.gap_std)).to(data.device, non_blocking=True)
        s = batch.draws.uniform() * (1 - gap)
        t = s + gap
        x_t = interpolate(data, noise, t)
        velocity = guided_velocity(actors.teacher, x_t, t, batch, self.options.guidance_scale)
        field = actors.student.field
        u, derivative = total_derivative(field, x_t, t, velocity, batch.condition, r=s, kind=self.own.derivative)
        step = tangent(u, velocity, derivative, t - s, share=self.rho(batch.progress), normaliser=self.own.normaliser)
        prediction = field(x_t, t, **first_rows(batch.condition, len(x_t)), r=s).to(x_t.dtype)
        loss = (prediction - (u + step)).square().flatten(1).sum(1).mean()
        return Loss(loss, {"residual": tangent(u, velocity, derivative, t - s).square().mean().sqrt()})

    def rho(self, progress: float) -> float:
        """The share of the derivative after this share of the updates."""
        if self.own.tangent_warmup == 0:
            return self.own.tangent_max
        return min(self.own.tangent_max, progress / self.own.tangent_warmup)
