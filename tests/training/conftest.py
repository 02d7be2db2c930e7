"""Trainings of a second or less, on two-dimensional data."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfd_fast.config import Settings
from mfd_fast.models import build_model
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.run_folder import RunFolder
from mfd_fast.settings_io import load_settings
from mfd_fast.task import Task
from mfd_fast.training.checkpoint import latest_checkpoint

TINY = (
    "model.options.width=16",
    "model.options.depth=1",
    "teacher.updates=12",
    "teacher.batch_size=16",
    "teacher.checkpoint_every=0",
    "teacher.log_every=1",
    "distill.student_updates=6",
    "distill.cycle_auxiliary=2",
    "distill.batch_size=16",
    "distill.rollout.step_size=0.25",
    "distill.log_every=1",
    "distill.checkpoint_every=0",
    "run.device=cpu",
    "run.tensorboard=false",
)


@pytest.fixture(autouse=True)
def _restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_settings() -> Callable[..., Settings]:
    """``tiny_settings("key=value", ...)``: settings of a run that takes no time."""

    def make(*overrides: str) -> Settings:
        return load_settings("mixture-2d", overrides=[*TINY, *overrides])

    return make


@pytest.fixture
def tiny_teacher() -> Callable[..., VelocityNetwork]:
    """A new small teacher, always with the same weights."""

    def make(num_classes: int | None = None) -> VelocityNetwork:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build_model("mlp", (2,), num_classes, width=16, depth=1)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.15)
        return model

    return make


@pytest.fixture
def labelled_task() -> Task:
    """Three labels that occur 8, 4 and 1 times."""
    label = torch.tensor([0] * 8 + [1] * 4 + [2])
    return Task((2,), {"label": label}, {"label": torch.tensor([3])}, (8, 4, 1))


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``stop_after(Class, k)``: a training of that class gets SIGTERM, once, in its update number k (from 1)."""

    def arrange(training: Any, update: int, number: int = signal.SIGTERM) -> None:
        original, sent = training.run_update, []

        def run_update(self: Any, index: int) -> Any:
            if index + 1 == update and not sent:
                sent.append(number)
                signal.raise_signal(number)
            return original(self, index)

        monkeypatch.setattr(training, "run_update", run_update)

    return arrange


@pytest.fixture
def read_log() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of a log without the seconds, which no two runs share."""

    def read(path: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert all(line.pop("seconds") >= 0 for line in lines)
        return lines

    return read


@pytest.fixture
def final_state() -> Callable[[RunFolder, str], dict[str, Tensor]]:
    """All tensors of the last checkpoint of a run and of its finished network."""

    def read(run: RunFolder, role: str) -> dict[str, Tensor]:
        folder = run.distill_checkpoints() if role == "student" else run.teacher_checkpoints()
        checkpoint, skipped = latest_checkpoint(folder)
        assert checkpoint is not None
        assert skipped == []
        tensors = {
            f"{group}/{name}": value for group, part in checkpoint.tensors.items() for name, value in part.items()
        }
        return tensors | run.read_tensors(role)

    return read
