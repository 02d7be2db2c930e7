"""One cycle of a distillation, ten auxiliary updates and one of the student, on a small DiT: as it was, and now.

    make bench

"eager": samples generated update by update, every network as PyTorch runs it. "ahead": the ten updates' samples in one
batch. "compiled": updates, samples and rollouts through compiled copies as well. Variants are compared over two cycles
before they are timed, and the ratio to "eager" in CPU time of one thread is printed.
"""

import functools
import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from mfd_fast.config import Settings
from mfd_fast.distillation import make_student
from mfd_fast.models import build_model
from mfd_fast.settings_io import load_settings
from mfd_fast.task import Task
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.context import Context
from mfd_fast.training.distill import DistillTraining
from mfd_fast.training.distributed import World
from mfd_fast.training.making_roles import make_roles
from mfd_fast.training.roles import TRAINED

SHAPE, CLASSES, LENGTH = (1, 8, 8), 10, 11
COMMON = (
    *("distill.cycle_auxiliary=10", "distill.cycle_student=1", "distill.student_updates=1000"),
    *("distill.guidance_scale=4.5", "distill.rollout.solver=euler", "distill.rollout.step_size=0.02"),
    *("distill.times.mean=-0.4", "distill.lora_rank=16", "distill.lora_alpha=16"),
    *(f"distill.{role}_optimizer.eps=1e-3" for role in ("auxiliary", "student")),
)
VARIANTS = {
    "eager": ("distill.sample_rows=1", "distill.compile=off", "distill.rollout.runner=eager"),
    "ahead": ("distill.compile=off", "distill.rollout.runner=eager"),
    "compiled": ("distill.compile=on", "distill.rollout.runner=compiled"),
}
EAGER: dict[tuple[str, int], float] = {}
"""Seconds of a cycle as it was."""


@functools.cache
def teacher() -> torch.nn.Module:
    """A DiT that is not the zero velocity it starts as."""
    torch.manual_seed(0)
    network = build_model("dit", SHAPE, CLASSES, width=128, depth=4, heads=4).requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return network


@functools.cache
def training(kind: str, rows: int, variant: str) -> tuple[DistillTraining, dict[str, Tensor]]:
    """A distillation that has had two cycles, and what its trained roles were then."""
    overrides = [*COMMON, f"distill.roles={kind}", f"distill.batch_size={rows}", *VARIANTS[variant]]
    settings: Settings = load_settings("digits-dit", overrides=overrides)
    label = torch.arange(CLASSES)
    task = Task(SHAPE, {"label": label}, {"label": torch.tensor([CLASSES])}, (1,) * CLASSES)
    context = Context(torch.device("cpu"), World())
    roles = make_roles(teacher(), settings.distill, seed=0)
    student = make_student(roles, task, settings.distill, context.device)
    conditions = ConditionTable(task.conditions, task.negative_condition, 0)
    made = DistillTraining(roles, student, conditions, settings.distill, 0, context)
    cycle(made, 0)
    cycle(made, 1)
    state = made.tensors()
    return made, {f"{role} {name}": state[role][name].clone() for role in TRAINED for name in state[role]}


def cycle(training: DistillTraining, number: int) -> None:
    """All updates of one cycle."""
    for update in range(number * LENGTH, (number + 1) * LENGTH):
        training.run_update(update)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [4, 32])
@pytest.mark.parametrize("kind", ["full", "lora"])
def bench_cycle(benchmark: BenchmarkFixture, kind: str, rows: int, variant: str) -> None:
    """Ten auxiliary updates and one of the student, Euler 0.02, guidance 4.5, float32, one thread."""
    if benchmark.disabled:
        pytest.skip("compiling takes minutes: run with --benchmark-enable")
    torch.set_num_threads(1)
    measured, roles = training(kind, rows, variant)
    for name, value in training(kind, rows, "eager")[1].items():
        torch.testing.assert_close(roles[name], value, rtol=1e-3, atol=1e-5)
    benchmark.group = f"cycle, {kind} roles, {rows} rows"
    benchmark.extra_info.update(torch=torch.__version__, threads=1, step_size=0.02, dtype="float32")
    benchmark._timer = time.process_time
    benchmark.pedantic(cycle, args=(measured, 2), rounds=5, warmup_rounds=1)
    seconds = benchmark.stats.stats.min
    EAGER.setdefault((kind, rows), seconds)
    ratio = EAGER[kind, rows] / seconds
    benchmark.extra_info["times_faster_than_eager"] = round(ratio, 2)
    print(f"\n{kind} roles, {rows} rows, {variant}: {1e3 * seconds:.0f} ms of CPU time, {ratio:.2f}x eager")
