"""Every method trains, stops, resumes with the same bits, and its student is measured."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast.config import Settings
from mfd_fast.data import load_dataset
from mfd_fast.data.dataset import Dataset
from mfd_fast.distillation import distill
from mfd_fast.evaluation import evaluate_run
from mfd_fast.finished import load_student
from mfd_fast.methods import METHODS
from mfd_fast.metrics.sliced_wasserstein import sliced_wasserstein
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.report import write_report
from mfd_fast.run_folder import RunFolder
from mfd_fast.task import Task
from mfd_fast.training.checkpoint import latest_checkpoint
from mfd_fast.training.context import make_context
from mfd_fast.training.distill import DistillTraining
from mfd_fast.training.interrupts import Interrupted
from mfd_fast.training.teacher import train_teacher

Make = Callable[..., Settings]
Teacher = Callable[..., VelocityNetwork]

VARIANTS: dict[str, tuple[str, ...]] = {
    **{name: (f"distill.method={name}",) for name in METHODS},
    "dmd2-four-steps": (
        *("distill.method=dmd2", "distill.student_steps=4", "distill.method_options.features=teacher"),
        "distill.method_options.ar1_weight=1.0",
    ),
    "dmd2-lora": ("distill.method=dmd2", "distill.roles=lora", "distill.lora_rank=2"),
    "dmd2-float16": ("distill.method=dmd2", "distill.precision=float16"),
    "senseflow-two-steps": ("distill.method=senseflow", "distill.student_steps=2"),
    "cd-slow-target": ("distill.method=cd", "distill.method_options.target_decay=0.9", "distill.student_steps=2"),
    "cd-continuous-lora": ("distill.method=cd", "distill.method_options.mode=continuous", "distill.roles=lora"),
    "meanflow-data": (
        *("distill.method=meanflow", "distill.method_options.velocity=data", "distill.method_options.kappa=0.5"),
        *("distill.method_options.start=random", "distill.method_options.derivative=finite-difference"),
        "distill.student_steps=2",
    ),
    "ayf-bfloat16": ("distill.method=ayf", "distill.precision=bfloat16", "distill.ema_decay=0.9"),
    "imm-accumulated": ("distill.method=imm", "distill.accumulation=2"),
}


@pytest.fixture(scope="module")
def labelled() -> Dataset:
    """Sixty points in three classes."""
    whole = load_dataset("mixture-2d", num_samples=60, num_held_out=30)
    return Dataset("points", whole.x, torch.arange(60) % 3, whole.held_out_x, torch.arange(30) % 3, num_classes=3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_resumes_with_the_same_bits(
    variant: str,
    tmp_path: Path,
    tiny_settings: Make,
    tiny_teacher: Teacher,
    labelled: Dataset,
    stop_after: Callable[..., None],
    final_state: Callable[[RunFolder, str], dict[str, Tensor]],
    read_log: Callable[[Path], list[dict[str, Any]]],
) -> None:
    settings = tiny_settings(*VARIANTS[variant], "distill.student_updates=5", "distill.cycle_auxiliary=2")
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    student = distill(tiny_teacher(3), settings, labelled, whole.path)
    stop_after(DistillTraining, 4)
    with pytest.raises(Interrupted, match="stopped after 4 of"):
        distill(tiny_teacher(3), settings, labelled, parts.path)
    distill(tiny_teacher(3), settings, labelled, parts.path, resume=True)
    actual, expected = final_state(parts, "student"), final_state(whole, "student")
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    lines = read_log(parts.path / "log.jsonl")
    assert lines == read_log(whole.path / "log.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]  # others tell of skipped updates: of the loss scale
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    loaded = load_student(whole.path)
    assert torch.equal(loaded.sample(8, seed=1), student.sample(8, seed=1))


def test_a_checkpoint_has_what_each_method_trains(
    tmp_path: Path, tiny_settings: Make, tiny_teacher: Teacher, labelled: Dataset
) -> None:
    groups = {
        "mfd": {"auxiliary", "student"},
        "dmd2": {"auxiliary", "student", "discriminator"},
        "meanflow": {"student"},
    }
    for name, roles in groups.items():
        settings = tiny_settings(f"distill.method={name}", "distill.student_updates=2")
        distill(tiny_teacher(3), settings, labelled, tmp_path / name)
        checkpoint, _ = latest_checkpoint(tmp_path / name / "checkpoints" / "distill")
        assert checkpoint is not None
        assert checkpoint.tensors.keys() == roles | {f"optimizer_{role}" for role in roles}
        assert all(checkpoint.tensors[f"optimizer_{role}"] for role in roles)
        assert checkpoint.state["done"] == (2 if name == "meanflow" else checkpoint.state["done"])


@pytest.fixture(scope="module")
def mixture_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Dataset]:
    """A teacher of the eight Gaussians, trained for a few seconds."""
    from mfd_fast.settings_io import load_settings

    quick = ("model.options.width=64", "model.options.depth=2", "teacher.updates=400", "teacher.batch_size=256")
    settings = load_settings("mixture-2d", overrides=[*quick, "run.device=cpu", "run.tensorboard=false"])
    run, dataset = RunFolder(tmp_path_factory.mktemp("mixture") / "run"), load_dataset("mixture-2d", num_samples=1000)
    run.path.mkdir()
    run.write_settings(settings)
    train_teacher(settings, dataset, run, make_context(settings.run))
    return run, dataset


QUICK = (
    *("distill.student_updates=60", "distill.batch_size=128", "distill.cycle_auxiliary=5"),
    *("distill.sample_every=0", "distill.checkpoint_every=0", "evaluate.num_samples=400", "evaluate.teacher_steps=[1]"),
    *("distill.rollout.step_size=0.1", "run.device=cpu", "run.tensorboard=false"),
)


@pytest.mark.parametrize("name", METHODS)
def test_a_short_training_helps_and_is_measured(
    name: str, tmp_path: Path, mixture_run: tuple[RunFolder, Dataset]
) -> None:
    from mfd_fast.settings_io import load_settings

    run, dataset = mixture_run
    settings = load_settings("mixture-2d", overrides=[*QUICK, f"distill.method={name}"])
    student = distill(run.read_teacher(), settings, dataset, tmp_path / name)
    metrics = evaluate_run(RunFolder(tmp_path / name), settings, dataset)
    numbers = [metrics["student"]["1"], metrics["precision"]["student"], metrics["recall"]["student"]]
    assert all(math.isfinite(number) for number in numbers)
    write_report(tmp_path / name)
    if name in ("mfd", "vsd", "dmd2", "senseflow"):  # methods that match distributions need only a few updates
        assert metrics["student"]["1"] < 0.8 * metrics["teacher"]["1"]
    assert sliced_wasserstein(student.sample(400), dataset.x) < 2


def test_a_task_without_samples_is_refused_by_methods_that_need_data(
    tmp_path: Path, tiny_settings: Make, tiny_teacher: Teacher
) -> None:
    task = Task((2,), {})
    with pytest.raises(ValueError, match=r"distill\.method 'cd' needs real samples: pass a data set, or Task\(samples"):
        distill(tiny_teacher(), tiny_settings("distill.method=cd"), task, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    distill(tiny_teacher(), tiny_settings("distill.method=reflow", "distill.student_updates=1"), task, tmp_path / "run")
