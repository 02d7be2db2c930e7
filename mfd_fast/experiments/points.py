"""Short trainings on points of the plane that several experiments share."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast.config import Settings
from mfd_fast.data import load_dataset
from mfd_fast.data.dataset import Dataset
from mfd_fast.distillation import distill
from mfd_fast.finished import load_student
from mfd_fast.intervals import LogitNormal, sample_pairs
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.path import interpolate
from mfd_fast.run_folder import RunFolder
from mfd_fast.settings_io import load_settings
from mfd_fast.streams import make_generator, standard_normal
from mfd_fast.student import Student
from mfd_fast.training.checkpoint import latest_checkpoint
from mfd_fast.training.context import make_context
from mfd_fast.training.teacher import train_teacher


class Snapshot(NamedTuple):
    """The networks at the end of a distillation."""

    student: Student
    teacher: VelocityNetwork
    auxiliary: VelocityNetwork


def points_settings(
    seed: int, teacher_updates: int, student_updates: int, step_size: float = 0.05, *more: str
) -> Settings:
    """The preset mixture-2d on the CPU with these budgets; ``more`` are texts ``key=value``."""
    texts = [
        f"teacher.updates={teacher_updates}",
        f"distill.student_updates={student_updates}",
        f"distill.rollout.step_size={step_size}",
        "distill.log_every=1",
        "distill.checkpoint_every=0",
        "run.device=cpu",
        "run.tensorboard=false",
        f"run.seed={seed}",
    ]
    return load_settings("mixture-2d", None, [*texts, *more])


def trained_teacher(settings: Settings, folder: Path, dataset: Dataset) -> VelocityNetwork:
    """The teacher kept in ``folder``, trained there if it is not; a stopped training goes on."""
    run = RunFolder(folder)
    if not run.has_network("teacher"):
        folder.mkdir(parents=True, exist_ok=True)
        run.write_settings(settings)
        train_teacher(settings, dataset, run, make_context(settings.run), resume="auto")
    teacher: VelocityNetwork = run.read_teacher()  # type: ignore[assignment]
    return teacher.eval()


def distilled(settings: Settings, folder: Path, teacher_folder: Path) -> RunFolder:
    """A finished distillation in ``folder`` of the teacher in ``teacher_folder``; a stopped one goes on."""
    dataset = load_dataset(settings.data.name, settings.data.root, **settings.data.options)
    teacher = trained_teacher(settings, teacher_folder, dataset)
    run = RunFolder(folder)
    if not run.has_network("student"):
        distill(teacher, settings, dataset, folder, resume="auto" if run.distill_checkpoints().exists() else False)
    return run


def snapshot(run: RunFolder) -> Snapshot:
    """Student, teacher and auxiliary of a finished distillation with full roles, as constants."""
    checkpoint, _ = latest_checkpoint(run.distill_checkpoints())
    assert checkpoint is not None, "a finished distillation has a last checkpoint"
    teacher, auxiliary = (run.read_teacher().eval().requires_grad_(False) for _ in range(2))
    with torch.no_grad():
        auxiliary.load_state_dict(checkpoint.tensors["auxiliary"])
    return Snapshot(load_student(run.path), teacher, auxiliary)  # type: ignore[arg-type]


def probe(student: Student, rows: int, seed: int, stream: str) -> tuple[Tensor, Tensor, Tensor]:
    """``x_t`` ``[rows, 2]``, ``t`` and ``r`` ``[rows]``: noised samples of the student, and intervals."""
    generator = make_generator(seed, stream)
    data = student.sample(rows, seed=seed)
    t, r = sample_pairs(LogitNormal(), rows, generator=generator)
    return interpolate(data, standard_normal(tuple(data.shape), generator), t), t, r
