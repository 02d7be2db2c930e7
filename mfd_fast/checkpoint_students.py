"""The student of a checkpoint: taken out of it, measured against the data, or written as a run of its own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfd_fast.config import Settings
from mfd_fast.data.dataset import Dataset, NoSamples
from mfd_fast.data.occupancy import OccupancyDataset
from mfd_fast.distillation import make_student
from mfd_fast.finished import student_description
from mfd_fast.metrics.digits_features import train_digits_classifier
from mfd_fast.metrics.evaluate import sample_report
from mfd_fast.run_folder import RunFolder
from mfd_fast.student import Student
from mfd_fast.task import Task
from mfd_fast.training.checkpoint import load_checkpoint
from mfd_fast.training.context import choose_device
from mfd_fast.training.distill import method_from
from mfd_fast.training.ema import WeightAverage
from mfd_fast.training.making_roles import make_roles
from mfd_fast.training.scores import Score


@dataclass(frozen=True)
class Restored:
    """A student as a checkpoint has it, by the weights it is judged by: the average if there is one."""

    student: Student
    state: dict[str, Tensor]
    """Its weights, as ``student.safetensors`` holds them."""
    description: dict[str, Any]
    """What ``student.json`` holds."""


def restore_student(
    run: RunFolder, checkpoint: Path, settings: Settings, dataset: Dataset, *, trust_code: bool = False
) -> Restored:
    """The student of a checkpoint of the run's distillation; ``trust_code`` as in `mfd_fast.load_student`.

    Raises:
        ValueError: the checkpoint is damaged or of another training, or the run's teacher comes from a pipeline.
    """
    if settings.model.pipeline is not None:
        raise ValueError("checkpoints of a pipeline's student cannot be taken out: finish the run, or resume it")
    kept = load_checkpoint(checkpoint)
    chosen = replace(settings.distill, zero_stage=0)
    needs = method_from(chosen).needs
    device = choose_device(settings.run.device, "run.device")
    teacher = run.read_teacher(trust_code=trust_code).to(device)
    task = Task.from_dataset(dataset, teacher)
    roles = make_roles(teacher, chosen, 0, needs)
    average = WeightAverage(roles.parameters("student"), chosen.ema_decay) if chosen.ema_decay else None
    kept.require(["student"] + ["student_average"] * (average is not None))
    roles.load_state_dict("student", kept.tensors["student"])
    if average is not None:
        try:
            average.load(kept.tensors["student_average"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{checkpoint}: its average does not fit the student: {error}") from error
        average.settle()
    description = student_description(run.read_description("teacher"), task, chosen, needs)
    return Restored(make_student(roles, task, chosen, device, needs), roles.state_dict("student"), description)


def make_judge(settings: Settings, dataset: Dataset) -> Callable[[Student], Score]:
    """Measures students as ``mfd-fast evaluate`` does: by the same distance, on the same noise and conditions.

    Raises:
        ValueError: the data have no samples to compare with, or their samples are forecasts.
    """
    if isinstance(dataset.x, NoSamples) or isinstance(dataset, OccupancyDataset):
        raise ValueError(f"checkpoints are measured against samples of the data, which {dataset.name!r} does not have")
    classifier = train_digits_classifier(dataset) if dataset.name == "digits" else None
    n = settings.evaluate.num_samples or len(dataset.x) + len(dataset.held_out_x)
    rows = {name: values[torch.arange(n) % len(values)] for name, values in dataset.conditions.items()}

    def judge(student: Student) -> Score:
        condition = rows | replace(student, condition_names=()).draw_condition(n, settings.run.seed)
        x = student.sample(n, condition, settings.run.seed, settings.evaluate.batch_size)
        report = sample_report(dataset, classifier, {"student": (x, condition.get("label"))})
        how = f"{report['distance']} of {report['feature_space']}, {n} samples, seed {settings.run.seed}"
        return Score(report["samples"]["student"]["distance"], how)

    return judge


def write_run(source: RunFolder, restored: Restored, out: Path) -> None:
    """A run folder with the teacher of ``source`` and this student; ValueError if ``out`` exists."""
    if out.exists():
        raise ValueError(f"{out} exists already: choose another folder")
    run = RunFolder(out)
    run.write_settings(source.read_settings())
    run.write_network("teacher", source.read_tensors("teacher"), source.read_description("teacher"))
    run.write_network("student", restored.state, restored.description)
