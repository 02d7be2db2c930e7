"""What the device computes is read only when it is shown; until then the host runs ahead."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from watching import READS, Calls

from mfd_fast.config import Settings
from mfd_fast.distillation import make_student
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.rollout import fixed_steps
from mfd_fast.student import Student
from mfd_fast.task import Task
from mfd_fast.training import unread
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.context import Context
from mfd_fast.training.distill import DistillTraining
from mfd_fast.training.distributed import World
from mfd_fast.training.loop import LoopOptions, run_training
from mfd_fast.training.making_roles import make_roles
from mfd_fast.training.unread import UnreadFlags

DELAY = 4
Start = Callable[..., DistillTraining]


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is treated as a device that one would have to wait for."""
    monkeypatch.setitem(unread.UNREAD, "cpu", DELAY)


@pytest.mark.usefixtures("delayed")
def test_flags_are_read_in_order_and_together() -> None:
    flags, seen = UnreadFlags(), []
    for number in range(6):
        flags.add(torch.tensor(number % 2 == 0), lambda value, number=number: seen.append((number, value)))
        assert len(seen) == (4 if number >= 3 else 0)
    flags.read()
    flags.read()
    assert seen == [(number, number % 2 == 0) for number in range(6)]


def test_on_the_cpu_nothing_waits() -> None:
    seen: list[bool] = []
    flags = UnreadFlags()
    flags.add(torch.tensor(True), seen.append)
    assert seen == [True]


class Reads(TorchDispatchMode):
    """Counts reads of numbers that the device computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal")
        return function(*args, **(kwargs or {}))


class Marked(nn.Module):
    """A teacher that tells when it is evaluated, and that can be broken."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.mark: list[Callable[[], None]] = []
        self.bad = False

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        for mark in self.mark:
            mark()
        velocity: Tensor = self.network(x, t, label)
        return velocity * torch.nan if self.bad else velocity


@pytest.fixture
def start(
    tiny_settings: Callable[..., Settings], tiny_teacher: Callable[..., VelocityNetwork], labelled_task: Task
) -> Callable[..., tuple[DistillTraining, Marked]]:
    def make(*overrides: str) -> tuple[DistillTraining, Marked]:
        settings = tiny_settings("distill.guidance_scale=1.5", "distill.ema_decay=0.5", *overrides).distill
        teacher = Marked(tiny_teacher(3))
        roles = make_roles(teacher, settings, seed=0)
        context = Context(torch.device("cpu"), World())
        student = make_student(roles, labelled_task, settings, context.device)
        conditions = ConditionTable(labelled_task.conditions, labelled_task.negative_condition, seed=0)
        return DistillTraining(roles, student, conditions, settings, 0, context), teacher

    return make


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_updates_read_nothing_that_the_device_computes(
    start: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Student, "time_grid", lambda self: [1.0, 0.0])  # two numbers of the host
    training, teacher = start(f"distill.precision={precision}")
    for update in range(3):
        training.run_update(update)  # the optimisers make their state in their first update
    for update in (3, 4):
        calls, reads = Calls(), Reads()
        with calls, reads:
            training.run_update(update)
        assert reads.count == 0
        assert not READS & set(calls.names)
    calls = Calls()
    # Evaluations are counted from the plan, which is on the host.
    monkeypatch.setattr(fixed_steps, "evaluations_of", lambda run, solver: run.clamp(min=1))
    for field in (teacher, training._roles.auxiliary):
        field.mark.append(lambda: calls.names.append("ROLLOUT"))
    with calls:
        training.run_update(5)
    last = len(calls.names) - calls.names[::-1].index("ROLLOUT")
    assert len(calls.names) > last + 50
    # Before that, the plan of the rollout reads times that are on the host.
    assert [name for name in calls.names[last:] if name in READS] == []


@pytest.mark.usefixtures("delayed")
def test_a_training_reads_rarely(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Student, "time_grid", lambda self: [1.0, 0.0])
    training, _ = start("distill.cycle_auxiliary=23", "distill.student_updates=1")
    training.log_due = lambda update: False
    run_update, calls, before = training.run_update, Calls(), []

    def note(update: int) -> Any:
        before.append(sum(name in READS for name in calls.names))
        return run_update(update)

    training.run_update = note
    with calls:
        run_training(training, options(tmp_path), World())
    # The flags of updates 0 to 3 are read, at once, after update 3.
    reads = [after - now for now, after in itertools.pairwise(before)]
    assert [update for update, count in enumerate(reads) if count] == [3, 7, 11, 15, 19]
    assert max(reads) == 1


def options(folder: Path, max_skipped: int = 3) -> LoopOptions:
    return LoopOptions(folder / "log.jsonl", folder / "checkpoints", None, 2, 0, max_skipped, {}, {}, False)


@pytest.mark.parametrize("delay", [1, DELAY])
def test_a_training_gives_up_soon_and_changes_nothing_on_the_way(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delay: int, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(unread.UNREAD, "cpu", delay)
    training, teacher = start("distill.log_every=1000", "distill.cycle_auxiliary=0", "distill.student_updates=50")
    run_update, ran, weights = training.run_update, [], {}

    def run(update: int) -> Any:
        teacher.bad = update >= 10
        if update in (10, 11):
            weights[update] = [value.clone() for group in training.tensors().values() for value in group.values()]
        ran.append(update)
        return run_update(update)

    training.run_update = run
    with pytest.raises(FloatingPointError, match=r"4 updates in a row .*the student in update 13"):
        run_training(training, options(tmp_path), World())
    assert ran[-1] == {1: 13, DELAY: 16}[delay]
    said = capsys.readouterr().out
    assert [update for update in range(50) if f"update {update} of the student was skipped" in said] == [10, 11, 12, 13]
    now = [value for group in training.tensors().values() for value in group.values()]
    assert all(torch.equal(a, b) for a, b in zip(now, weights[10], strict=True)), "average and optimiser included"
