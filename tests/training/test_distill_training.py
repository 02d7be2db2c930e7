"""Updates of a distillation, without the loop around them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfd_fast.config import Settings
from mfd_fast.distillation import make_student
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.streams import RowDraws
from mfd_fast.student import Student
from mfd_fast.task import Task
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.context import Context
from mfd_fast.training.distill import DistillTraining
from mfd_fast.training.distributed import World
from mfd_fast.training.making_roles import make_roles

Make = Callable[..., Settings]
Start = Callable[..., tuple[DistillTraining, Any]]


@pytest.fixture
def start(tiny_settings: Make, tiny_teacher: Callable[..., VelocityNetwork], labelled_task: Task) -> Start:
    """``start("key=value", ...)`` gives a training of a labelled teacher and its roles."""

    def make(*overrides: str, teacher: nn.Module | None = None, on_samples: Any = None) -> tuple[DistillTraining, Any]:
        settings = tiny_settings(*overrides).distill
        roles = make_roles(teacher or tiny_teacher(3), settings, seed=0)
        context = Context(torch.device("cpu"), World())
        student = make_student(roles, labelled_task, settings, context.device)
        conditions = ConditionTable(labelled_task.conditions, labelled_task.negative_condition, seed=0)
        return DistillTraining(roles, student, conditions, settings, 0, context, on_samples), roles

    return make


def weights(roles: Any, role: str) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in roles.parameters(role)])


@pytest.mark.parametrize("kind", ["full", "lora", "lora-student"])
def test_an_update_changes_only_its_role(start: Start, kind: str) -> None:
    training, roles = start(f"distill.roles={kind}")
    low_rank = roles.parts["student"] if kind == "lora-student" else roles
    teacher = roles.teacher if kind == "full" else low_rank.module
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    for update in range(6):
        before = {role: weights(roles, role) for role in ("auxiliary", "student")}
        done = training.run_update(update)
        assert done.role == ("student" if update in (2, 5) else "auxiliary")
        other = "auxiliary" if done.role == "student" else "student"
        assert not torch.equal(weights(roles, done.role), before[done.role])
        assert torch.equal(weights(roles, other), before[other])
        assert all(parameter.grad is None for parameter in roles.parameters(other))
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())


def test_accumulated_parts_equal_one_large_batch(start: Start) -> None:
    # Adam divides a gradient by its size; with a large eps the smallest ones, all rounding, stay small.
    eps = ("distill.auxiliary_optimizer.eps=1e-3", "distill.student_optimizer.eps=1e-3")
    one, roles_one = start(*eps, "distill.guidance_scale=2.0")
    four, roles_four = start(*eps, "distill.guidance_scale=2.0", "distill.accumulation=4")
    before = weights(roles_one, "student")
    for update in range(9):
        a, b = one.run_update(update), four.run_update(update)
        assert b.loss.item() == pytest.approx(a.loss.item(), rel=1e-5)
        assert b.report.grad_norm.item() == pytest.approx(a.report.grad_norm.item(), rel=1e-4)
        if a.role == "student":  # a root mean square over the whole batch
            assert b.logs["velocity_gap"].item() == pytest.approx(a.logs["velocity_gap"].item(), rel=1e-4)
    for role in ("auxiliary", "student"):
        torch.testing.assert_close(weights(roles_four, role), weights(roles_one, role), rtol=0, atol=1e-6)
    assert (weights(roles_one, "student") - before).abs().max() > 1e-4


def test_updates_draw_different_numbers_and_repeat_exactly(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    original = RowDraws.normal

    def note(self: RowDraws, sample_shape: tuple[int, ...]) -> Tensor:
        drawn.append(original(self, sample_shape))
        return drawn[-1]

    monkeypatch.setattr(RowDraws, "normal", note)
    losses = []
    for _ in range(2):
        training, _ = start()
        losses.append([training.run_update(update).loss.item() for update in (0, 1, 2, 5, 8)])
    assert losses[0] == losses[1]
    first, second = torch.stack(drawn).chunk(2)
    assert torch.equal(first, second)
    assert len(first) == 10
    assert len(first.unique()) == first.numel(), "noise and path noise of every update of every role are their own"


def test_logs_say_whether_a_run_is_healthy(start: Start) -> None:
    training, _ = start("distill.guidance_scale=1.5")
    training.run_update(0)
    auxiliary, student = training.run_update(1), training.run_update(2)
    assert auxiliary.logs == {}
    assert {"velocity_gap", "velocity_gap_bins", "evaluations", "sample_mean", "sample_std"} <= student.logs.keys()
    assert student.logs["velocity_gap_bins"].shape == (10,)
    assert student.loss.item() == pytest.approx(student.logs["velocity_gap"].item() ** 2 / 2, rel=1e-5)
    # Euler with steps of at most a quarter: the guided teacher computes two rows where the auxiliary computes one.
    assert student.logs["evaluations"].item() * 16 % 3 == 0
    assert 3 <= student.logs["evaluations"].item() <= 12


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_keeps_float32_weights(start: Start, precision: str, kind: str) -> None:
    training, roles = start(f"distill.precision={precision}", f"distill.roles={kind}", "distill.ema_decay=0.9")
    before = {role: weights(roles, role) for role in ("auxiliary", "student")}
    reports = [training.run_update(update).report for update in range(15)]
    # The loss scale of float16 starts high and falls until the gradients fit.
    assert sum(report.skipped for report in reports) <= (0 if precision == "bfloat16" else 8)
    state = [value for group in training.tensors().values() for value in group.values()]
    assert all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in state)
    for role in ("auxiliary", "student"):
        assert not torch.equal(weights(roles, role), before[role])
    scale = training.numbers()["student"]["loss_scale"]
    assert ("scale" in scale) == (precision == "float16")


def test_bfloat16_is_close_to_float32(start: Start) -> None:
    exact, _ = start()
    rounded, _ = start("distill.precision=bfloat16")
    for update in range(3):
        a, b = exact.run_update(update), rounded.run_update(update)
        assert b.report.grad_norm.item() == pytest.approx(a.report.grad_norm.item(), rel=0.05)
        assert b.report.grad_norm != a.report.grad_norm


class Broken(nn.Module):
    """Returns NaN in one row of every batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.broken = False

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        velocity: Tensor = self.network(x, t, label)
        return velocity.index_fill(0, torch.tensor([0]), math.nan) if self.broken else velocity


def test_a_teacher_that_is_not_finite_skips_the_students_update(
    start: Start, tiny_teacher: Callable[..., VelocityNetwork]
) -> None:
    teacher = Broken(tiny_teacher(3))
    training, roles = start("distill.ema_decay=0.5", teacher=teacher)
    for update in range(5):
        training.run_update(update)
    teacher.broken = True
    before = weights(roles, "student")
    average = {name: value.clone() for name, value in training.tensors()["student_average"].items()}
    assert training.run_update(5).report.skipped
    assert torch.equal(weights(roles, "student"), before)
    assert all(torch.equal(average[name], value) for name, value in training.tensors()["student_average"].items())
    teacher.broken = False
    assert not training.run_update(8).report.skipped
    assert not torch.equal(weights(roles, "student"), before)


def test_samples_are_shown_with_the_averaged_weights(start: Start) -> None:
    seen: list[tuple[int, Tensor]] = []

    def show(updates: int, student: Student) -> None:
        seen.append((updates, student.sample(4, seed=1)))

    training, roles = start("distill.sample_every=2", "distill.ema_decay=0.9", on_samples=show)
    training.after_update(0)
    for update in range(12):
        training.run_update(update)
        training.after_update(update + 1)
    assert [updates for updates, _ in seen] == [0, 2, 4]
    with training.student_weights():
        averaged = weights(roles, "student")
        shown = training._student.sample(4, seed=1)
    assert not torch.equal(averaged, weights(roles, "student"))
    assert torch.equal(shown, seen[-1][1])
    assert not torch.equal(training._student.sample(4, seed=1), shown)


def test_when_lines_checkpoints_and_samples_are_due(start: Start) -> None:
    training, _ = start("distill.log_every=2", "distill.checkpoint_every=3", "distill.student_updates=6")
    assert training.total_updates == 18
    # Student updates are 2, 5, 8, ...: the first and every second is logged, with the auxiliary's update before it.
    assert [update for update in range(18) if training.log_due(update)] == [1, 2, 7, 8, 13, 14, 17]
    assert [done for done in range(1, 19) if training.checkpoint_due(done)] == [9, 18]
    never, _ = start("distill.checkpoint_every=0")
    assert not any(never.checkpoint_due(done) for done in range(1, 19))


def test_schedules_know_how_many_updates_their_role_has(start: Start) -> None:
    training, _ = start(
        "distill.student_updates=2",
        "distill.auxiliary_optimizer.schedule=linear",
        "distill.auxiliary_optimizer.learning_rate=1.0",
        "distill.student_optimizer.schedule=linear",
        "distill.student_optimizer.learning_rate=1.0",
    )
    rates = [training.run_update(update).report.learning_rate for update in range(6)]
    assert rates == pytest.approx([1.0, 0.75, 1.0, 0.5, 0.25, 0.5])
