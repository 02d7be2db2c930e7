"""What a finished run is worth: samples of teacher and student against the data, in ``metrics.json``."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfd_fast.config import Settings
from mfd_fast.data.dataset import Dataset
from mfd_fast.data.occupancy import Decoder, OccupancyDataset
from mfd_fast.fields import autocast
from mfd_fast.finished import load_student
from mfd_fast.guidance import FixedGuidance
from mfd_fast.metrics.digits_features import DigitsClassifier
from mfd_fast.metrics.evaluate import sample_report
from mfd_fast.occupancy import score_forecasts
from mfd_fast.phases import Phases
from mfd_fast.rows import map_tensors
from mfd_fast.run_folder import RunFolder
from mfd_fast.storage import read_json, write_file, write_json
from mfd_fast.student import Student
from mfd_fast.task import Task
from mfd_fast.training.context import Context, choose_device
from mfd_fast.training.distributed import World
from mfd_fast.training.optimizing import PRECISIONS
from mfd_fast.types import VelocityField

Samples = Mapping[str, tuple[Tensor, Tensor | None]]


def evaluate_run(
    run: RunFolder,
    settings: Settings,
    dataset: Dataset,
    *,
    classifier: DigitsClassifier | None = None,
    decoder: Decoder | None = None,
    phases: Phases | None = None,
    context: Context | None = None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Sample teacher and student with the same noise and condition, measure them, write ``metrics.json`` and samples.

    The teacher is sampled by Euler steps as ``settings.evaluate`` says; the student with its own steps. Fréchet
    distances are to all real samples, training and held-out, for as many samples as there are real ones; occupancy is
    scored by IoU (`mfd_fast.occupancy`), its windows shared among the processes of ``context``. Samples are drawn on
    the device of ``context``, or of ``settings.run``; ValueError if it is not there. The main process writes and gets
    the metrics, the others get nothing. ``trust_code`` is as in `mfd_fast.load_student`.
    """
    phases = phases or Phases()
    context = context or Context(choose_device(settings.run.device, "run.device"), World())
    if context.world.is_main:
        print("measuring samples of the teacher and of the student", flush=True)  # it can take minutes
    if isinstance(dataset, OccupancyDataset):
        samplers = make_samplers(run, settings, dataset, context.device, trust_code)
        metrics = score_forecasts(run, settings, dataset, samplers, decoder, phases, context.world)
    if not context.world.is_main:
        return {}
    if not isinstance(dataset, OccupancyDataset):
        with phases.phase("sample"):
            samples = draw_samples(run, settings, dataset, context.device, trust_code)
        with phases.phase("evaluate"):
            metrics = summarise(sample_report(dataset, classifier, samples), settings)
    previous = read_json(run.path / "metrics.json") if (run.path / "metrics.json").is_file() else {}
    for name, spent in (("seconds", phases.seconds), ("cpu_seconds", phases.cpu_seconds)):
        metrics[name] = previous.get(name, {}) | spent
    write_json(run.path / "metrics.json", metrics)
    return metrics


def make_samplers(
    run: RunFolder, settings: Settings, dataset: Dataset, device: torch.device, trust_code: bool = False
) -> dict[str, Student]:
    """``teacher-STEPS`` for every number of steps of ``settings.evaluate``, and ``student-STEPS``; networks compute in
    the precision of the student.
    """
    teacher = run.read_teacher(trust_code=trust_code).to(device)
    task = Task.from_dataset(dataset, teacher)
    field: VelocityField = autocast(teacher, PRECISIONS[settings.distill.precision])
    if settings.evaluate.teacher_guidance_scale != 1.0:
        if task.negative_condition is None:
            raise ValueError("evaluate.teacher_guidance_scale must be 1.0: the teacher has no negative condition")
        negative = map_tensors(task.negative_condition, lambda value: value.to(device))
        field = FixedGuidance(field, negative, settings.evaluate.teacher_guidance_scale)
    sampler = Student(
        field,
        task.sample_shape,
        shift=settings.evaluate.teacher_shift,
        label_counts=task.label_counts,
        device=device,
        value_range=task.value_range,
    )
    makers = {f"teacher-{steps}": replace(sampler, steps=steps) for steps in settings.evaluate.teacher_steps}
    student = load_student(run.path, device=str(device), trust_code=trust_code)
    return makers | {f"student-{student.steps}": student}


def draw_samples(
    run: RunFolder, settings: Settings, dataset: Dataset, device: torch.device, trust_code: bool = False
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Samples ``[N, *sample_shape]`` and labels ``[N]`` of each role, also written to ``evaluation/ROLE-STEPS.npz``.

    Labels are drawn as often as the data have them, other conditions are those of the first training samples. Beside
    the samples ``data.npz`` keeps as many training samples, for the report.
    """
    makers = make_samplers(run, settings, dataset, device, trust_code)
    n = settings.evaluate.num_samples or len(dataset.x) + len(dataset.held_out_x)
    kept = torch.arange(min(n, len(dataset.x)))
    condition = {name: rows[torch.arange(n) % len(rows)] for name, rows in dataset.conditions.items()}
    condition |= next(iter(makers.values())).draw_condition(n, settings.run.seed)
    samples = {}
    for name, maker in makers.items():
        x = maker.sample(n, condition, settings.run.seed, settings.evaluate.batch_size)
        samples[name] = (x, condition.get("label"))
        write_samples(run.path / "evaluation" / f"{name}.npz", x, condition.get("label"))
    label = None if dataset.label is None else dataset.label[kept]
    write_samples(run.path / "evaluation" / "data.npz", dataset.x[kept], label)
    return samples


def write_samples(path: Path, x: Tensor, label: Tensor | None) -> None:
    """Write ``x`` float32 and, if there are labels, ``condition`` int64 as npz."""
    arrays: dict[str, Any] = {"x": x.to(torch.float32).numpy()}
    if label is not None:
        arrays["condition"] = label.to(torch.int64).numpy()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    write_file(path, write)


def summarise(report: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """By role: distances by number of steps; the rest for the teacher's most steps and for the student."""
    by_role: dict[str, dict[str, dict[str, Any]]] = {"teacher": {}, "student": {}}
    for name, values in report["samples"].items():
        role, _, steps = name.rpartition("-")
        by_role[role][steps] = values
    best = {role: values[max(values, key=int)] for role, values in by_role.items() if values}
    metrics: dict[str, Any] = {
        role: {steps: values["distance"] for steps, values in entries.items()} for role, entries in by_role.items()
    }
    metrics["data_half_half"] = report["data_half_half"]
    metrics["held_out"] = {role: values["distance_held_out"] for role, values in best.items()}
    metrics["held_out"]["data"] = report["held_out_distance"]
    for name in ("precision", "recall", "class_agreement"):
        metrics[name] = {role: values[name] for role, values in best.items()}
    metrics["nearest_neighbour"] = {role: values["nearest_neighbour"] for role, values in best.items()}
    metrics["nearest_neighbour"]["held_out"] = report["held_out_nearest_neighbour"]
    named = {name: report[name] for name in ("distance", "feature_space")}
    return metrics | named | {"seed": settings.run.seed}
