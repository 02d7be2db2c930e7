"""DMD2 (arXiv 2405.14867): distribution matching with a normed difference of data predictions, and a discriminator.

With x_t = (1-t) G + t e and data predictions ``D_M = x_t - t v_M``::

    g = (D_A - D_T) / mean |G - D_T|   (per sample),      student loss = 1/2 mean (G - stop(G - g))^2 + gan_weight L_G

The discriminator tells real from generated samples, both noised to t', by features of the teacher or the auxiliary;
``L_D = softplus(D(fake)) + softplus(-D(real))``, ``L_G = softplus(-D(fake))``. It is trained in auxiliary updates.

A student of several steps is trained on what it meets when it samples: steps without gradient from noise to a random
one of its times, fresh noise between them ("backward simulation"), then one step with gradient.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mfd_fast.config import NOT_NEGATIVE, SHARE, one_of
from mfd_fast.intervals import Uniform
from mfd_fast.methods.base import Actors, Batch, Discriminator, Loss, Needs, OwnOptions, real_samples, spread
from mfd_fast.methods.mfd import MeanFlowDistillation, surrogate_loss
from mfd_fast.methods.vsd import both_velocities, gap_logs
from mfd_fast.path import data_prediction, expand_times, interpolate


@dataclass(frozen=True, kw_only=True)
class DMD2Options(OwnOptions):
    """Options of `DistributionMatchingDistillation2`."""

    gan_weight: Annotated[float, "weight of the discriminator in the student's loss (0: none)", NOT_NEGATIVE] = 3e-3
    discriminator_weight: Annotated[float, "weight of the discriminator's loss", NOT_NEGATIVE] = 1e-2
    features: Annotated[
        str, "whose features it sees; the auxiliary's learn with it", one_of("teacher", "auxiliary")
    ] = "auxiliary"
    normalise: Annotated[bool, "whether g is divided by mean |G - D_T|"] = True
    simulation_share: Annotated[float, "share of the updates with backward simulation, not noised data", SHARE] = 1.0
    ar1_weight: Annotated[float, "weight of the approximated R1 penalty (arXiv 2501.08316)", NOT_NEGATIVE] = 0.0
    ar1_noise: Annotated[float, "size of its perturbation", NOT_NEGATIVE] = 0.1


class StudentStep(NamedTuple):
    """One of the student's steps, and where it leads."""

    x: Tensor
    """Its start ``[B, ...]``, without gradient."""
    now: float
    """The time of its start."""
    then: float
    """The time of the next step's start; 0 for the last."""
    data: Tensor
    """``x - now v``: the data that the student predicts, ``[B, ...]``."""


class DistributionMatchingDistillation2(MeanFlowDistillation):
    """See the module."""

    summary = "DMD2 (arXiv 2405.14867): normed difference of data predictions, discriminator on features; data"
    Own = DMD2Options
    own: DMD2Options

    @property
    def needs(self) -> Needs:
        """An auxiliary; data and a discriminator unless they have no weight."""
        adversarial = self.own.gan_weight > 0
        return Needs(
            data=adversarial or self.own.simulation_share < 1,
            discriminator=self.own.features if adversarial else None,
            renoising=True,
        )

    def samples(self, actors: Actors, batch: Batch) -> Tensor:
        """What a random step of the student predicts, without gradient."""
        return self.student_step(actors, batch, batch.draws.normal(actors.student.sample_shape)).data

    def auxiliary_loss(self, actors: Actors, batch: Batch, samples: Tensor) -> Loss:
        """Flow matching of the auxiliary on the student's predictions, and the discriminator's loss."""
        loss = super().auxiliary_loss(actors, batch, samples).value
        if actors.discriminator is None:
            return Loss(loss, {})
        adversarial, logs = self._discriminator_loss(actors.discriminator, batch, samples)
        adversarial = self.own.discriminator_weight * adversarial
        logs["flow_matching"] = loss.detach()
        return Loss(loss + adversarial if self.own.features == "auxiliary" else loss, logs, adversarial)

    def student_loss(self, actors: Actors, batch: Batch) -> Loss:
        """Distribution matching, and the generator's part of the game."""
        noise = batch.draws.normal(actors.student.sample_shape)
        path_noise = batch.draws.normal(actors.student.sample_shape)
        t = batch.draws.times(self.options.pair_law)
        step = self.student_step(actors, batch, noise, with_gradient=True)
        times = t.to(step.data.device, non_blocking=True)
        x_t = interpolate(step.data.detach(), path_noise, times)
        teacher, auxiliary = both_velocities(actors, batch, x_t, times, self.teacher_scale(batch))
        gap = teacher - auxiliary
        direction = expand_times(times, gap) * gap  # D_A - D_T
        if self.own.normalise:
            size = (step.data.detach() - data_prediction(x_t, times, teacher)).abs().flatten(1).mean(1)
            direction = (direction / expand_times(size, direction)).nan_to_num()
        loss, logs = surrogate_loss(step.data, direction), gap_logs(gap, t) | spread(step.data)
        for name, (weight, part) in self.further_losses(actors, batch, step).items():
            logs[name] = part.detach()
            loss = loss + weight * part
        return Loss(loss, logs)

    def further_losses(self, actors: Actors, batch: Batch, step: StudentStep) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of what is added to distribution matching, by name."""
        if actors.discriminator is None:
            return {}
        logits, t = self._judge(actors.discriminator, batch, step.data)
        return {"generator_loss": (self.own.gan_weight, self.generator_loss(logits, t))}

    def teacher_scale(self, batch: Batch) -> float | Tensor:
        """The teacher's guidance in distribution matching, one number or ``[B]``."""
        return self.options.guidance_scale

    def generator_loss(self, fake: Tensor, t: Tensor) -> Tensor:
        """The student's loss of the logits ``[B]`` of its samples noised to ``t`` ``[B]``."""
        return softplus(-fake).mean()

    def judge_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        """The discriminator's loss of its logits ``[B]``."""
        return (softplus(fake) + softplus(-real)).mean()

    def student_step(self, actors: Actors, batch: Batch, noise: Tensor, *, with_gradient: bool = False) -> StudentStep:
        """A random step of the student on what it would meet there."""
        student, draws = actors.student, batch.draws
        grid = student.time_grid()
        k = draws.integer(student.steps) if student.steps > 1 else 0
        share = self.own.simulation_share
        simulate = share == 1 or (share > 0 and draws.integer(1_000_000) < share * 1_000_000)
        x = noise
        with torch.no_grad():
            for now, then in pairwise(grid[: k + 1]) if simulate else ():
                data = student.jump(x, now, 0.0, batch.condition)
                x = (1 - then) * data + then * draws.normal(student.sample_shape)
        if not simulate:
            x = (1 - grid[k]) * real_samples(batch) + grid[k] * noise
        with torch.set_grad_enabled(with_gradient):
            return StudentStep(x, grid[k], grid[k + 1], student.jump(x, grid[k], 0.0, batch.condition))

    def _judge(self, discriminator: Discriminator, batch: Batch, data: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of ``data`` noised to random times, and the times."""
        t = batch.draws.times(Uniform()).to(data.device, non_blocking=True)
        noised = interpolate(data, batch.draws.normal(tuple(data.shape[1:])), t)
        return discriminator(noised, t, batch.condition), t

    def _discriminator_loss(
        self, discriminator: Discriminator, batch: Batch, fake: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        t = batch.draws.times(Uniform()).to(fake.device, non_blocking=True)
        shape = tuple(fake.shape[1:])
        noised_fake, noised_real = (
            interpolate(data, batch.draws.normal(shape), t) for data in (fake, real_samples(batch))
        )
        fake_logits, real_logits = (discriminator(x, t, batch.condition) for x in (noised_fake, noised_real))
        loss = self.judge_loss(fake_logits, real_logits)
        logs = {"logit_gap": (real_logits - fake_logits).detach().mean(), "discriminator_loss": loss.detach()}
        if self.own.ar1_weight > 0:
            perturbed = noised_real + self.own.ar1_noise * batch.draws.normal(shape)
            penalty = ar1(real_logits, discriminator(perturbed, t, batch.condition))
            loss = loss + self.own.ar1_weight * penalty
        return loss, logs


def ar1(logits: Tensor, perturbed: Tensor) -> Tensor:
    """The approximated R1 penalty ``mean (D(x) - D(x + sigma n))^2``, about ``sigma^2 |grad D|^2``."""
    return (logits - perturbed).square().mean()
