"""Distilling a tiny SANA: batches as large as a side or the channels of a latent, and two processes."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mfd_fast.distillation import make_student
from mfd_fast.models.sana import SanaNetwork
from mfd_fast.settings_io import load_settings
from mfd_fast.task import Task
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.context import Context
from mfd_fast.training.distill import DistillTraining
from mfd_fast.training.distributed import World
from mfd_fast.training.making_roles import make_roles
from mfd_fast.training.roles import TRAINED

COMMON = (
    *("distill.precision=float32", "distill.lora_rank=4", "distill.cycle_auxiliary=2", "distill.sample_rows=64"),
    *("distill.rollout.step_size=0.25", "distill.student_updates=3", "distill.compile=off"),
    *(f"distill.{role}_optimizer.{name}" for role in ("student", "auxiliary")
      for name in ("name=adamw", "eps=1e-2", "learning_rate=0.05")),
)  # fmt: skip
WORKER = """
import os, sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mfd_fast.cli import main
from mfd_fast.streams import RowDraws

rank, seen = os.environ["RANK"], {}
normal, pairs, times = RowDraws.normal, RowDraws.pairs, RowDraws.times

def note(name, value):
    seen[f"{name} {len(seen):03d}"] = value.clone()

def noted_normal(self, shape):
    value = normal(self, shape)
    note("noise", value)
    return value

def noted_pairs(self, law, equal_share):
    value = pairs(self, law, equal_share)
    note("pair", torch.stack(value))
    return value

def noted_times(self, law):
    value = times(self, law)
    note("time", value)
    return value

RowDraws.normal, RowDraws.pairs, RowDraws.times = noted_normal, noted_pairs, noted_times
code = main(sys.argv[2:])
save_file(seen, Path(sys.argv[1]) / f"seen-{rank}.safetensors")
raise SystemExit(code)
"""


@pytest.fixture
def task() -> Task:
    """Prompts of a transformer of `make_sana`, 4 channels, side 4."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (10,), generator=generator)
    rows = {
        "prompt_embeds": torch.randn(10, 8, 16, generator=generator),
        "prompt_mask": torch.arange(8) < lengths[:, None],
    }
    null = {"prompt_embeds": torch.randn(1, 8, 16, generator=generator), "prompt_mask": (torch.arange(8) < 2)[None]}
    return Task((4, 4, 4), rows, null)


def trained(teacher: Any, task: Task, rows: int, accumulation: int, kind: str) -> dict[str, Tensor]:
    """Both roles after three cycles."""
    chosen = [*COMMON, f"distill.roles={kind}", f"distill.batch_size={rows}", f"distill.accumulation={accumulation}"]
    settings = load_settings("sana-1600m", overrides=chosen).distill
    context = Context(torch.device("cpu"), World())
    roles = make_roles(SanaNetwork(teacher), settings, seed=0)
    student = make_student(roles, task, settings, context.device)
    conditions = ConditionTable(task.conditions, task.negative_condition, 0)
    training = DistillTraining(roles, student, conditions, settings, 0, context)
    for update in range(training.total_updates):
        training.run_update(update)
    return {f"{role} {name}": value for role in TRAINED for name, value in roles.state_dict(role).items()}


@pytest.mark.parametrize(("kind", "rows"), [("lora", 4), ("lora", 6), ("lora-student", 4)])
def test_a_batch_trains_as_its_rows_one_by_one_do(
    make_sana: Callable[..., Any], task: Task, kind: str, rows: int
) -> None:
    """With 4 rows a time that is broadcast along the side or the channels of a latent would go unnoticed."""
    teacher = make_sana(sample_size=4)
    together = trained(teacher, task, rows, 1, kind)
    apart = trained(teacher, task, rows, rows, kind)
    for name, value in together.items():
        torch.testing.assert_close(value, apart[name], rtol=1e-4, atol=1e-5)
    moved = [float(value.abs().max()) for name, value in together.items() if name.endswith("lora_B")]
    assert min(moved) > 1e-3


def start(folder: Path, size: int, arguments: list[str]) -> "list[subprocess.Popen[str]]":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    ranks = [os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    command = [sys.executable, "-W", "ignore", "-c", WORKER, str(folder), *arguments]
    return [subprocess.Popen(command, env=rank, stderr=subprocess.PIPE, text=True) for rank in ranks]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_draw_different_noise_and_times(sana_pipeline: Path, tmp_path: Path) -> None:
    from tiny_pipeline import write_prompts

    from mfd_fast.cli import main

    encoded, prompts = tmp_path / "encoded", write_prompts(tmp_path / "prompts.tsv")
    encode = ["encode-prompts", str(prompts), str(encoded), "--pipeline", str(sana_pipeline), "--device", "cpu"]
    assert main(encode) == 0
    settings = (*COMMON, f"data.root={encoded}", "distill.batch_size=4", "distill.sample_every=0", "run.device=cpu")
    chosen = [part for setting in (*settings, "run.tensorboard=false") for part in ("--set", setting)]
    command = ["distill", "--preset", "sana-1600m", "--pipeline", str(sana_pipeline), *chosen]
    processes = start(tmp_path, 2, [*command, "--run", str(tmp_path / "two")])
    for process in processes:
        _, words = process.communicate(timeout=250)
        assert process.returncode == 0, words
    first, second = (load_file(tmp_path / f"seen-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert {name.split()[0] for name in first} == {"noise", "pair", "time"}
    for name, value in first.items():
        assert not torch.isin(value, second[name]).any(), name
    assert main([*command, "--run", str(tmp_path / "one")]) == 0
    two, one = (load_file(tmp_path / run / "student.safetensors") for run in ("two", "one"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
