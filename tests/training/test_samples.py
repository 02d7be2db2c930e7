"""Samples that are generated ahead are those that would have been generated one update at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfd_fast.config import Settings
from mfd_fast.distillation import distill, make_student
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.run_folder import RunFolder
from mfd_fast.student import Student
from mfd_fast.task import Task
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.context import Context
from mfd_fast.training.distill import DistillTraining
from mfd_fast.training.distributed import World
from mfd_fast.training.interrupts import Interrupted
from mfd_fast.training.making_roles import make_roles

Start = Callable[..., tuple[DistillTraining, Any]]
CYCLE = ("distill.cycle_auxiliary=5", "distill.cycle_student=2", "distill.student_updates=6", "distill.batch_size=8")
LARGE_EPS = tuple(f"distill.{role}_optimizer.eps=1e-3" for role in ("auxiliary", "student"))


@pytest.fixture
def start(
    tiny_settings: Callable[..., Settings], tiny_teacher: Callable[..., VelocityNetwork], labelled_task: Task
) -> Start:
    """``start("key=value", ...)``: a training of five auxiliary and two student updates a cycle."""

    def make(*overrides: str, world: World | None = None) -> tuple[DistillTraining, Any]:
        settings = tiny_settings(*CYCLE, *LARGE_EPS, *overrides).distill
        roles = make_roles(tiny_teacher(3), settings, seed=0)
        context = Context(torch.device("cpu"), world or World())
        student = make_student(roles, labelled_task, settings, context.device)
        conditions = ConditionTable(labelled_task.conditions, labelled_task.negative_condition, seed=0)
        return DistillTraining(roles, student, conditions, settings, 0, context), roles

    return make


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call that generates samples without a gradient."""
    rows: list[int] = []
    original = Student.generate

    def note(self: Student, noise: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if not named.get("with_gradient"):
            rows.append(len(noise))
        return original(self, noise, *arguments, **named)

    monkeypatch.setattr(Student, "generate", note)
    return rows


def losses(training: DistillTraining) -> list[float]:
    return [training.run_update(update).loss.item() for update in range(training.total_updates)]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    ("accumulation", "sample_rows", "batches"),
    [(1, 1000, [40]), (1, 24, [24, 16]), (1, 39, [32, 8]), (2, 12, [12, 12, 12, 4]), (2, 1, [4] * 10)],
)
def test_equal_to_one_update_at_a_time(
    start: Start, generated: list[int], kind: str, accumulation: int, sample_rows: int, batches: list[int]
) -> None:
    alone, _ = start("distill.sample_rows=1", f"distill.roles={kind}")
    expected = losses(alone)
    assert generated == [8] * 15
    generated.clear()
    ahead, _ = start(
        f"distill.sample_rows={sample_rows}", f"distill.accumulation={accumulation}", f"distill.roles={kind}"
    )
    assert losses(ahead) == pytest.approx(expected, rel=1e-5)
    assert generated == batches * 3
    assert len(set(expected)) == len(expected)


def test_samples_come_from_the_present_student(start: Start) -> None:
    training, _ = start()
    seen = []
    for update in range(training.total_updates):
        if training.cycle.role(update) == "auxiliary":
            (sampled,) = training._samples.take(update)
            with torch.no_grad():
                draws, condition = training._draw(update, training._shares[0])
                expected = training._student.generate(draws.normal((2,)), condition)
            torch.testing.assert_close(sampled.data, expected, rtol=1e-5, atol=1e-6)
            assert not sampled.data.requires_grad
            seen.append(sampled.data)
        training.run_update(update)
    assert len(torch.cat(seen).unique(dim=0)) == 15 * 8, "noise of every update is its own"


def test_samples_of_a_student_that_has_changed_are_forgotten(start: Start) -> None:
    training, _ = start("distill.student_optimizer.learning_rate=0.1", "distill.guidance_scale=1.5")
    training.run_update(0)
    early = training._samples._ready[1, 0].data
    training.run_update(5)
    late = training._samples.take(1)[0].data
    assert (late - early).abs().max() > 1e-3


def test_two_processes_have_the_parts_of_one(start: Start) -> None:
    one, _ = start()
    halves = [start(world=World(rank, 2))[0] for rank in (0, 1)]
    whole = one._samples.take(3)[0]
    parts = [training._samples.take(3)[0] for training in halves]
    torch.testing.assert_close(torch.cat([part.data for part in parts]), whole.data, rtol=1e-5, atol=1e-6)
    after = torch.cat([part.draws.normal((2,)) for part in parts])
    assert torch.equal(after, whole.draws.normal((2,))), "what is drawn later is the same too"


class Noisy(nn.Module):
    """Adds noise of the global generator to what a network returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        velocity: Tensor = self.network(x, t, label)
        return velocity + 0.1 * torch.randn_like(velocity)


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6, 9])
@pytest.mark.parametrize("sample_rows", [1000, 20])
def test_a_stop_in_the_middle_of_a_cycle_changes_no_bit(
    stop: int,
    sample_rows: int,
    tmp_path: Path,
    tiny_settings: Callable[..., Settings],
    tiny_teacher: Callable[..., VelocityNetwork],
    labelled_task: Task,
    stop_after: Callable[..., None],
) -> None:
    settings = tiny_settings(*CYCLE, f"distill.sample_rows={sample_rows}", "distill.student_updates=4")
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    distill(Noisy(tiny_teacher(3)), settings, labelled_task, whole.path)
    stop_after(DistillTraining, stop)
    with pytest.raises(Interrupted):
        distill(Noisy(tiny_teacher(3)), settings, labelled_task, parts.path)
    distill(Noisy(tiny_teacher(3)), settings, labelled_task, parts.path, resume=True)
    expected = whole.read_tensors("student")
    assert all(torch.equal(value, expected[name]) for name, value in parts.read_tensors("student").items())


def test_another_limit_on_resume_is_said(
    tmp_path: Path,
    tiny_settings: Callable[..., Settings],
    tiny_teacher: Callable[..., VelocityNetwork],
    labelled_task: Task,
    stop_after: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_after(DistillTraining, 3)
    with pytest.raises(Interrupted):
        distill(tiny_teacher(3), tiny_settings(*CYCLE), labelled_task, tmp_path)
    distill(tiny_teacher(3), tiny_settings(*CYCLE, "distill.sample_rows=8"), labelled_task, tmp_path, resume=True)
    assert "no longer bit for bit as without a stop: sample_rows was 1024, is 8" in capsys.readouterr().out
