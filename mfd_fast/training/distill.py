"""The distillation of a teacher: cycles of auxiliary and student updates."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mfd_fast.config import DistillSettings
from mfd_fast.fields import autocast
from mfd_fast.methods import MethodOptions, make_method
from mfd_fast.methods.base import Actors, Loss
from mfd_fast.partial_guidance import check_savings
from mfd_fast.rollout.compiled import compiled_field, measured_choices
from mfd_fast.rollout.execute import pair_options
from mfd_fast.streams import RowDraws, Share, make_generator
from mfd_fast.student import Student
from mfd_fast.training.checkpoint import Checkpoint
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.context import Context
from mfd_fast.training.culprit import Culprit, find_culprit
from mfd_fast.training.ema import WeightAverage
from mfd_fast.training.loop import Update
from mfd_fast.training.optimizing import PRECISIONS, RoleOptimizer
from mfd_fast.training.roles import TRAINED, Roles
from mfd_fast.training.samples import SamplesAhead
from mfd_fast.training.step import Updates, Work, make_updates
from mfd_fast.training.teacher import law_from
from mfd_fast.types import Condition, VelocityField

GUIDANCE_SAVINGS = ("guidance_interval", "negative_every")
"""Settings of the rollout that are not about the solver."""

SampleHook = Callable[[int, Student], None]
"""Gets the number of student updates and the student."""


class Cycle:
    """Which role update number i belongs to: ``auxiliary`` updates, then ``student`` updates, and again."""

    def __init__(self, auxiliary: int, student: int) -> None:
        self.auxiliary, self.student = auxiliary, student
        self._length = auxiliary + student

    def role(self, update: int) -> str:
        """The role of update number ``update`` (from 0)."""
        return "auxiliary" if update % self._length < self.auxiliary else "student"

    def auxiliary_updates(self, update: int) -> range:
        """The auxiliary updates of the cycle of update number ``update``."""
        first = update // self._length * self._length
        return range(first, first + self.auxiliary)

    def student_updates(self, done: int) -> int:
        """Student updates among the first ``done`` updates."""
        cycles, rest = divmod(done, self._length)
        return cycles * self.student + max(0, rest - self.auxiliary)

    def total(self, student_updates: int) -> int:
        """Updates until the student has had ``student_updates``."""
        cycles, rest = divmod(student_updates, self.student)
        return cycles * self._length + (self.auxiliary + rest if rest else 0)


class DistillTraining:
    """The roles, their optimisers and the method; see `mfd_fast.training.loop.Training`."""

    title = "distillation"

    def __init__(
        self,
        roles: Roles,
        student: Student,
        conditions: ConditionTable,
        settings: DistillSettings,
        seed: int,
        context: Context,
        on_samples: SampleHook | None = None,
    ) -> None:
        self.cycle = Cycle(settings.cycle_auxiliary, settings.cycle_student)
        self.total_updates = self.cycle.total(settings.student_updates)
        self._settings, self._seed, self._context = settings, seed, context
        self._roles, self._student, self._conditions = roles, student, conditions
        self._method = make_method(settings.method, method_options(settings))
        self._on_samples = on_samples
        dtype = PRECISIONS[settings.precision]
        self._shares = context.shares(settings.batch_size, settings.accumulation)
        teacher, auxiliary = autocast(roles.teacher, dtype), autocast(roles.auxiliary, dtype)
        updates = self._make_updates(auxiliary)
        self.compiled = updates.compiled
        """Whether updates are compiled."""
        # Each role is compiled where it is trained; rollouts choose for themselves how to run the auxiliary.
        self._actors = {
            "auxiliary": Actors(teacher, updates.auxiliary, student),
            "student": Actors(teacher, auxiliary, replace(student, field=updates.student)),
        }
        self._plain_actors = Actors(teacher, auxiliary, student)
        self._samples = SamplesAhead(
            self._generate,
            student.sample_shape,
            self._draw,
            self._shares,
            self.cycle.auxiliary_updates,
            rows=settings.sample_rows,
            seed=seed,
            device=context.device,
        )
        totals = {"student": settings.student_updates}
        totals["auxiliary"] = self.total_updates - settings.student_updates
        chosen = {"auxiliary": settings.auxiliary_optimizer, "student": settings.student_optimizer}
        self._optimizers = {
            role: RoleOptimizer(
                roles.parameters(role),
                chosen[role],
                total_updates=totals[role],
                precision=settings.precision,
                world=context.world,
            )
            for role in TRAINED
        }
        self.average = (
            WeightAverage(roles.parameters("student"), settings.ema_decay) if settings.ema_decay > 0 else None
        )

    def _make_updates(self, auxiliary: VelocityField) -> Updates:
        share, device = self._shares[0], self._context.device
        x = torch.zeros(share.rows, *self._student.sample_shape, dtype=torch.float32, device=device)
        return make_updates(
            self._settings.compile,
            auxiliary,
            self._student.field,
            {role: self._roles.parameters(role) for role in TRAINED},
            Work(self.total_updates * len(self._shares), x, self._conditions.draw(0, share, device)),
            lambda words: print(f"{self.title}: {words}", flush=True) if self._context.world.is_main else None,
        )

    def _generate(self, noise: Tensor, condition: Condition) -> Tensor:
        """Samples of the student for the auxiliary, by the compiled copy if updates are compiled."""
        if not self.compiled:
            return self._student.generate(noise, condition)
        return replace(self._student, field=compiled_field(self._student.field)).generate(noise, condition)

    def run_update(self, update: int) -> Update:
        """One update of the role whose turn it is."""
        role = self.cycle.role(update)
        optimizer = self._optimizers[role]
        parts = []
        for loss in self._losses(update):
            optimizer.backward(loss.value, len(self._shares))
            parts.append({"loss": loss.value.detach(), **loss.logs})
        report = optimizer.step()
        if role == "student":
            self._samples.forget()
            if self.average is not None:
                self.average.update(optimizer.updates, report.skipped)
        logs = {name: torch.stack([part[name] for part in parts]).nanmean(0) for name in parts[0]}
        return Update(role, report, logs.pop("loss"), logs)

    def _losses(self, update: int) -> Iterator[Loss]:
        """The losses of the backward passes of an update, one at a time."""
        if self.cycle.role(update) == "auxiliary":
            for draws, condition, data in self._samples.take(update):
                yield self._method.auxiliary_loss(self._actors["auxiliary"], draws, condition, data)
            return
        actors, negative = self._actors["student"], self._conditions.negative(self._context.device)
        for share in self._shares:
            yield self._method.student_loss(actors, *self._draw(update, share), negative)

    def _draw(self, update: int, share: Share) -> tuple[RowDraws, Condition]:
        """The random numbers and the condition of a share of the batch of an update."""
        generator = make_generator(self._seed, f"distill/{self.cycle.role(update)}", update)
        device = self._context.device
        return RowDraws(generator, share, device), self._conditions.draw(update, share, device)

    def _share_loss(self, update: int, share: Share) -> tuple[Tensor, RowDraws]:
        """The loss of any rows of an update's batch, computed apart from the others and never compiled."""
        draws, condition = self._draw(update, share)
        if self.cycle.role(update) == "auxiliary":
            with torch.no_grad():
                data = self._student.generate(draws.normal(self._student.sample_shape), condition)
            return self._method.auxiliary_loss(self._plain_actors, draws, condition, data).value, draws
        negative = self._conditions.negative(self._context.device)
        return self._method.student_loss(self._plain_actors, draws, condition, negative).value, draws

    def find_culprit(self, update: int) -> Culprit:
        """The first sample of this process's share whose loss or gradient is not finite."""
        parameters = [
            (f"{index} of the {role}", value)
            for role in TRAINED
            for index, value in enumerate(self._roles.parameters(role))
        ]
        return find_culprit(self._shares, parameters, partial(self._share_loss, update))

    def log_due(self, update: int) -> bool:
        """Every ``log_every`` student updates: that update and the auxiliary's last before it; and the last update."""
        student = self.cycle.student_updates(update)
        due = student % self._settings.log_every == 0 or update + 1 == self.total_updates
        if self.cycle.role(update) == "student":
            return due
        return due and self.cycle.role(update + 1) == "student"

    def checkpoint_due(self, done: int) -> bool:
        """Every ``checkpoint_every`` student updates."""
        return self._every(done, self._settings.checkpoint_every)

    def after_update(self, done: int) -> None:
        """Hand a fixed-noise sample to whoever wants to see it, before the start and every ``sample_every``."""
        if self._on_samples is not None and (done == 0 or self._every(done, self._settings.sample_every)):
            with self.student_weights():
                self._on_samples(self.cycle.student_updates(done), self._student)

    def student_weights(self) -> AbstractContextManager[None]:
        """Inside, the student has the weights it is judged by: the average if there is one."""
        return nullcontext() if self.average is None else self.average.applied()

    def exactness(self) -> dict[str, object]:
        """What must stay equal for a resume to give the same bits, apart from the context."""
        runner = "compiled" if self.compiled else self._settings.rollout.runner
        choices = measured_choices(runner, self._context.device)
        return {"compiled updates": self.compiled, "sample_rows": self._settings.sample_rows} | choices

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Both trained roles, their optimisers and the student's average."""
        groups = {role: self._roles.state_dict(role) for role in TRAINED}
        groups |= {f"optimizer_{role}": self._optimizers[role].tensors() for role in TRAINED}
        if self.average is not None:
            groups["student_average"] = self.average.tensors()
        return groups

    def numbers(self) -> dict[str, Any]:
        """The optimisers' counters."""
        return {role: self._optimizers[role].numbers() for role in TRAINED}

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint; ValueError names what it lacks."""
        checkpoint.require(self.tensors())
        for role in TRAINED:
            self._roles.load_state_dict(role, checkpoint.tensors[role])
            numbers = checkpoint.state["training"][role]
            self._optimizers[role].load(checkpoint.tensors[f"optimizer_{role}"], numbers)
        self._samples.forget()
        if self.average is not None:
            self.average.load(checkpoint.tensors["student_average"])

    def _every(self, done: int, interval: int) -> bool:
        """Whether update ``done`` completed a multiple of ``interval`` student updates."""
        if interval == 0 or self.cycle.role(done - 1) != "student":
            return False
        return self.cycle.student_updates(done) % interval == 0


def method_options(settings: DistillSettings) -> MethodOptions:
    """What the method needs, from the settings.

    Raises:
        ValueError: the settings of the rollout do not fit each other.
    """
    rollout = asdict(settings.rollout)
    check_savings(rollout["guidance_interval"], rollout["negative_every"])
    pair_options(**{name: value for name, value in rollout.items() if name not in GUIDANCE_SAVINGS})
    return MethodOptions(
        guidance_scale=settings.guidance_scale,
        pair_law=law_from(settings.times),
        equal_share=settings.times.equal_share,
        auxiliary_law=law_from(settings.auxiliary_times),
        rollout=rollout,
    )
