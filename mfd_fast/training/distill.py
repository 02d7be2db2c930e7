"""The distillation of a teacher: cycles of auxiliary and student updates."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mfd_fast.config import DistillSettings
from mfd_fast.fields import autocast
from mfd_fast.methods import MethodOptions, make_method
from mfd_fast.methods.base import Actors
from mfd_fast.rollout.execute import pair_options
from mfd_fast.streams import RowDraws, make_generator
from mfd_fast.student import Student
from mfd_fast.training.checkpoint import Checkpoint
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.context import Context
from mfd_fast.training.ema import WeightAverage
from mfd_fast.training.loop import Update
from mfd_fast.training.optimizing import PRECISIONS, RoleOptimizer
from mfd_fast.training.roles import TRAINED, Roles
from mfd_fast.training.teacher import law_from

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
        self._actors = Actors(autocast(roles.teacher, dtype), autocast(roles.auxiliary, dtype), student)
        self._shares = context.shares(settings.batch_size, settings.accumulation)
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

    def run_update(self, update: int) -> Update:
        """One update of the role whose turn it is."""
        role = self.cycle.role(update)
        optimizer = self._optimizers[role]
        negative = self._conditions.negative(self._context.device)
        generator = make_generator(self._seed, f"distill/{role}", update)
        state = generator.get_state()
        parts = []
        for share in self._shares:
            draws = RowDraws(generator.set_state(state), share, self._context.device)
            condition = self._conditions.draw(update, share, self._context.device)
            if role == "auxiliary":
                loss = self._method.auxiliary_loss(self._actors, draws, condition)
            else:
                loss = self._method.student_loss(self._actors, draws, condition, negative)
            optimizer.backward(loss.value, len(self._shares))
            parts.append({"loss": loss.value.detach(), **loss.logs})
        report = optimizer.step()
        if role == "student" and self.average is not None and not report.skipped:
            self.average.update(optimizer.updates)
        logs = {name: torch.stack([part[name] for part in parts]).nanmean(0) for name in parts[0]}
        return Update(role, report, logs.pop("loss"), logs)

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
    pair_options(**rollout)
    return MethodOptions(
        guidance_scale=settings.guidance_scale,
        pair_law=law_from(settings.times),
        equal_share=settings.times.equal_share,
        auxiliary_law=law_from(settings.auxiliary_times),
        rollout=rollout,
    )
