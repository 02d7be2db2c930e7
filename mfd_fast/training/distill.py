"""The distillation of a teacher: cycles of auxiliary and student updates."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.config import DistillSettings
from mfd_fast.fields import autocast
from mfd_fast.methods import Method, MethodOptions, make_method
from mfd_fast.methods.base import Actors, Batch, Loss, Needs, averaged
from mfd_fast.partial_guidance import check_savings
from mfd_fast.rollout.compiled import compiled_field, measured_choices
from mfd_fast.rollout.execute import pair_options
from mfd_fast.streams import RowDraws, Share, make_generator
from mfd_fast.student import Student
from mfd_fast.training.checkpoint import Checkpoint
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.context import Context
from mfd_fast.training.culprit import Culprit, find_culprit
from mfd_fast.training.discriminator import make_discriminator
from mfd_fast.training.ema import WeightAverage
from mfd_fast.training.loop import Update
from mfd_fast.training.optimizing import PRECISIONS, RoleOptimizer, UpdateReport
from mfd_fast.training.roles import Roles
from mfd_fast.training.samples import SamplesAhead
from mfd_fast.training.step import Updates, Work, make_updates
from mfd_fast.training.teacher import law_from
from mfd_fast.training.teacher_weights import GateInputs, LowPrecisionTeacher
from mfd_fast.training.zero_roles import ZeroAverage, ZeroOptimizer, sharded_roles
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
        low: LowPrecisionTeacher | None = None,
    ) -> None:
        self._method = method_from(settings)
        needs = self._method.needs
        self.cycle = Cycle(settings.cycle_auxiliary, settings.cycle_student) if needs.auxiliary else Cycle(0, 1)
        self.total_updates = self.cycle.total(settings.student_updates)
        self._settings, self._seed, self._context = settings, seed, context
        self._roles, self._student, self._conditions = roles, student, conditions
        self._sharded = sharded_roles(roles)
        self._on_samples = on_samples
        self._trained = trained_roles(needs)
        dtype = PRECISIONS[settings.precision]
        self._shares = context.shares(settings.batch_size, settings.accumulation)
        fields = {"teacher": autocast(roles.teacher, dtype)}
        fields["auxiliary"] = autocast(roles.auxiliary, dtype) if needs.auxiliary else fields["teacher"]
        self._teacher, self._low = fields["teacher"], low
        in_rollouts = fields["teacher"] if low is None else low.field
        updates = self._make_updates(fields["auxiliary"])
        self.compiled = updates.compiled
        """Whether updates are compiled."""
        self._discriminator = make_discriminator(fields, needs.discriminator, seed, context.device)
        self.average = self._make_average(settings.ema_decay)
        self._target = self._make_average(needs.target_decay)
        slow = nullcontext if self._target is None else self._target.applied
        # Each role is compiled where it is trained; rollouts choose for themselves how to run the auxiliary.
        self._actors = {
            "auxiliary": Actors(fields["teacher"], updates.auxiliary, student, self._discriminator),
            "student": Actors(
                in_rollouts,
                fields["auxiliary"],
                replace(student, field=updates.student),
                self._discriminator,
                slow,
            ),
        }
        self._plain_actors = Actors(in_rollouts, fields["auxiliary"], student, self._discriminator, slow)
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
        self._optimizers = {role: self._make_optimizer(role) for role in self._trained}
        if self._discriminator is not None:
            self._optimizers["discriminator"] = self._make_optimizer("discriminator")

    def _make_average(self, decay: float) -> WeightAverage | None:
        if decay == 0:
            return None
        if "student" in self._sharded:
            return ZeroAverage(self._sharded["student"], decay)
        return WeightAverage(self._roles.parameters("student"), decay)

    def _make_optimizer(self, part: str) -> RoleOptimizer | ZeroOptimizer:
        """The optimiser of a role or of the discriminator, which is updated together with the auxiliary."""
        settings, of_student = self._settings, self._settings.student_updates
        chosen = {
            "student": settings.student_optimizer,
            "auxiliary": settings.auxiliary_optimizer,
            "discriminator": settings.discriminator_optimizer,
        }
        total = of_student if part == "student" else self.total_updates - of_student
        if part in self._sharded:
            return ZeroOptimizer(self._sharded[part], chosen[part], total_updates=total)
        optimizer = RoleOptimizer(
            self._parameters(part),
            chosen[part],
            total_updates=total,
            precision=settings.precision,
            world=self._context.world,
        )
        if optimizer.note is not None and self._context.world.is_main:
            print(f"{self.title}, {part}: {optimizer.note}", flush=True)
        return optimizer

    def _parameters(self, part: str) -> list[nn.Parameter]:
        if part == "discriminator":
            assert self._discriminator is not None, "only a method with a discriminator asks for its weights"
            return list(self._discriminator.head.parameters())
        return self._roles.parameters(part)

    def _make_updates(self, auxiliary: VelocityField) -> Updates:
        if self._sharded:
            engines = {role: sharded.field() for role, sharded in self._sharded.items()}
            return Updates(engines.get("auxiliary", auxiliary), engines.get("student", self._student.field), False)
        share, device, student = self._shares[0], self._context.device, self._student
        if self._method.needs.renoising:  # such methods train one step at a time
            student = replace(student, steps=1, grad_steps=None)
        x = torch.zeros(share.rows, *self._student.sample_shape, dtype=torch.float32, device=device)
        return make_updates(
            self._settings.compile if "auxiliary" in self._trained else "off",
            auxiliary,
            student,
            {role: self._roles.parameters(role) for role in self._trained},
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
        self._refresh_all_but(role)
        self._check_teacher(self.cycle.student_updates(update))
        parts = []
        for loss in self._losses(update):
            if loss.discriminator is not None:
                self._optimizers["discriminator"].backward(loss.discriminator, len(self._shares), keep_graph=True)
            self._optimizers[role].backward(loss.value, len(self._shares))
            parts.append({"loss": loss.value.detach(), **loss.logs})
        report = self._step(role)
        if role == "student":
            self._after_student_update(report.skipped)
        logs = {name: averaged(name, torch.stack([part[name] for part in parts])) for name in parts[0]}
        return Update(role, report, logs.pop("loss"), logs)

    def _check_teacher(self, student_updates: int) -> None:
        """Raise ValueError if a teacher of 8 bits changes the gradient too much; measured now and then."""
        if self._low is None or not self._low.due(student_updates):
            return
        rows = self._shares[0].rows
        inputs = GateInputs(self._student, self._conditions, self._method.options, rows, self._seed)
        self._low.check(student_updates, self._teacher, self._plain_actors.auxiliary, inputs, self._context)

    def _refresh_all_but(self, role: str | None) -> None:
        """Rollouts and samples are computed with the present weights of the other roles."""
        for other, sharded in self._sharded.items():
            if other != role:
                sharded.refresh()

    def _step(self, role: str) -> UpdateReport:
        report = self._optimizers[role].step()
        if role == "auxiliary" and self._discriminator is not None:
            report = report._replace(skipped=report.skipped | self._optimizers["discriminator"].step().skipped)
        return report

    def _after_student_update(self, skipped: Tensor) -> None:
        """The averages take the new weights in; the method may move others."""
        self._samples.forget()
        for average in self._averages().values():
            average.update(self._optimizers["student"].updates, skipped)
        auxiliary = self._roles.parameters("auxiliary") if "auxiliary" in self._trained else []
        self._method.after_student_update(auxiliary, self._roles.parameters("student"))

    def _losses(self, update: int) -> Iterator[Loss]:
        """The losses of the backward passes of an update, one at a time."""
        if self.cycle.role(update) == "student":
            for share in self._shares:
                batch = self._batch(update, share, *self._draw(update, share))
                yield self._method.student_loss(self._actors["student"], batch)
            return
        actors = self._actors["auxiliary"]
        if self._student.steps > 1 and self._student.gamma > 0:  # samples that are more than a function of one noise
            for share in self._shares:
                batch = self._batch(update, share, *self._draw(update, share))
                with torch.no_grad():
                    samples = self._method.samples(actors, batch)
                yield self._method.auxiliary_loss(actors, batch, samples)
            return
        for share, (draws, condition, samples) in zip(self._shares, self._samples.take(update), strict=True):
            yield self._method.auxiliary_loss(actors, self._batch(update, share, draws, condition), samples)

    def _batch(self, update: int, share: Share, draws: RowDraws, condition: Condition) -> Batch:
        device = self._context.device
        return Batch(
            draws,
            condition,
            self._conditions.negative(device),
            self._conditions.samples(update, share, device),
            self.cycle.student_updates(update) / max(1, self._settings.student_updates),
        )

    def _draw(self, update: int, share: Share) -> tuple[RowDraws, Condition]:
        """The random numbers and the condition of a share of the batch of an update."""
        generator = make_generator(self._seed, f"distill/{self.cycle.role(update)}", update)
        device = self._context.device
        return RowDraws(generator, share, device), self._conditions.draw(update, share, device)

    def _share_loss(self, update: int, share: Share) -> tuple[Tensor, RowDraws]:
        """The loss of any rows of an update's batch, computed apart from the others and never compiled."""
        batch = self._batch(update, share, *self._draw(update, share))
        if self.cycle.role(update) == "student":
            return self._method.student_loss(self._plain_actors, batch).value, batch.draws
        with torch.no_grad():
            samples = self._method.samples(self._plain_actors, batch)
        return self._method.auxiliary_loss(self._plain_actors, batch, samples).value, batch.draws

    def find_culprit(self, update: int) -> Culprit:
        """The first sample of this process's share whose loss or gradient is not finite."""
        self._refresh_all_but(None)
        parameters = [
            (f"{index} of the {role}", value)
            for role in self._optimizers
            for index, value in enumerate(self._parameters(role))
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
        if done == 0 or self._every(done, self._settings.sample_every):
            self._refresh_all_but("auxiliary")
            with self.student_weights():  # of all processes, also those that have nobody to show it to
                if self._on_samples is not None:
                    self._on_samples(self.cycle.student_updates(done), self._student)

    def student_weights(self) -> AbstractContextManager[None]:
        """Inside, the student has the weights it is judged by: the average if there is one."""
        return nullcontext() if self.average is None else self.average.applied()

    def settle_student(self) -> None:
        """Give the student the weights it is judged by for good."""
        if self.average is not None:
            self.average.settle()
        self._refresh_all_but("auxiliary")

    def exactness(self) -> dict[str, object]:
        """What must stay equal for a resume to give the same bits, apart from the context."""
        runner = "compiled" if self.compiled else self._settings.rollout.runner
        choices = measured_choices(runner, self._context.device)
        stage: dict[str, object] = {"zero_stage": self._settings.zero_stage} if self._sharded else {}
        if self._settings.zero_offload:
            stage["zero_offload"] = True
        low = {} if self._low is None else {"teacher_weights": self._low.kind}
        return {"compiled updates": self.compiled, "sample_rows": self._settings.sample_rows} | choices | stage | low

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The trained roles, a discriminator, their optimisers and the student's averages."""
        groups = {role: self._roles.state_dict(role) for role in self._trained}
        if self._discriminator is not None:
            groups["discriminator"] = dict(self._discriminator.head.state_dict())
        groups |= {f"optimizer_{part}": optimizer.tensors() for part, optimizer in self._optimizers.items()}
        return groups | {name: average.tensors() for name, average in self._averages().items()}

    def _averages(self) -> dict[str, WeightAverage]:
        named = {"student_average": self.average, "target_average": self._target}
        return {name: average for name, average in named.items() if average is not None}

    def numbers(self) -> dict[str, Any]:
        """The optimisers' counters."""
        return {part: optimizer.numbers() for part, optimizer in self._optimizers.items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint; ValueError names what it lacks."""
        checkpoint.require(self.tensors())
        for role in self._trained:
            self._roles.load_state_dict(role, checkpoint.tensors[role])
        if self._discriminator is not None:
            self._discriminator.head.load_state_dict(checkpoint.tensors["discriminator"])
        for part, optimizer in self._optimizers.items():
            optimizer.load(checkpoint.tensors[f"optimizer_{part}"], checkpoint.state["training"][part])
        self._samples.forget()
        for name, average in self._averages().items():
            average.load(checkpoint.tensors[name])

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
        own=settings.method_options,
    )


def method_from(settings: DistillSettings) -> Method:
    """The method of a distillation; ValueError for a name or an option that is none."""
    return make_method(settings.method, method_options(settings))


def trained_roles(needs: Needs) -> tuple[str, ...]:
    """The roles that a method with these needs trains."""
    return ("auxiliary", "student") if needs.auxiliary else ("student",)
