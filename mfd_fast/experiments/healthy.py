"""Healthy: the logs of a good run and of runs with one thing wrong, on the eight Gaussians.

Made by the package's own trainer:

* ``good``: the preset;
* ``slow-auxiliary``: one auxiliary update before each of the student, with a small learning rate;
* ``fast-student``: a student whose learning rate is far too high;

and, because the trainer does not make these mistakes, by the few lines of `plain_training`, which is all of Mean Flow
Distillation without anything around it:

* ``plain``: without a mistake, to compare with;
* ``no-auxiliary``: the conditional velocity ``e - x0`` in the auxiliary's place;
* ``bfloat16-weights``: the student's weights rounded to bfloat16 after every update, at the learning rate of
  ``plain``, so that what is smaller than half a unit in a weight's last place is lost.

Logged are the numbers that ``log.jsonl`` has. The distance of the finished student says what each was worth.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mfd_fast.data import load_dataset
from mfd_fast.data.dataset import Dataset, all_rows
from mfd_fast.experiments.affine import thinned
from mfd_fast.experiments.base import Experiment, Result, Results, Work, spread_words
from mfd_fast.experiments.distance import smoothed
from mfd_fast.experiments.drawing import logarithmic
from mfd_fast.experiments.points import distilled, points_settings, trained_teacher
from mfd_fast.finished import load_student
from mfd_fast.intervals import LogitNormal, sample_pairs
from mfd_fast.mean_velocity import mean_velocity
from mfd_fast.methods.mfd import flow_matching_loss, surrogate_loss
from mfd_fast.metrics.sliced_wasserstein import sliced_wasserstein
from mfd_fast.path import conditional_velocity, interpolate
from mfd_fast.report.record import column, read_run
from mfd_fast.report.theme import Theme, new_figure
from mfd_fast.streams import make_generator, standard_normal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOGGED = ("velocity_gap", "sample_std", "grad_norm")
TRAINED: Mapping[str, tuple[str, ...]] = {
    "good": (),
    "slow-auxiliary": ("distill.cycle_auxiliary=1", "distill.auxiliary_optimizer.learning_rate=1e-5"),
    "fast-student": ("distill.student_optimizer.learning_rate=2e-2",),
}
"""Cells of the trainer: what differs from the preset."""
PLAIN = ("plain", "no-auxiliary", "bfloat16-weights")
TITLES = {
    "good": "a good run",
    "slow-auxiliary": "auxiliary too slow",
    "fast-student": "student too fast",
    "plain": "a good run, small learning rate",
    "no-auxiliary": "no auxiliary",
    "bfloat16-weights": "bfloat16 weights",
}


@dataclass(frozen=True)
class HealthySettings:
    """Sizes of the experiment."""

    teacher_updates: int = 800
    student_updates: int = 240
    plain_rate: float = 2e-5
    """Learning rate of the student of `plain_training`."""
    step_size: float = 0.1
    """Of `plain_training`."""
    batch_size: int = 256


def run(settings: HealthySettings, cell: str, work: Work) -> Result:
    """The logs of a run, and the distances of its student and of the teacher's single step to the data."""
    texts = TRAINED.get(cell, ())
    chosen = points_settings(work.seed, settings.teacher_updates, settings.student_updates, 0.05, *texts)
    dataset = load_dataset(chosen.data.name)
    teacher = trained_teacher(chosen, work.folder / "teacher", dataset)
    if cell in TRAINED:
        training = distilled(chosen, work.folder / cell, work.folder / "teacher")
        record = read_run(training.path)
        logs = {name: column(record.student_log, name)[1].tolist() for name in LOGGED}
        logs["auxiliary_loss"] = column(record.auxiliary_log, "loss")[1].tolist()
        samples = load_student(training.path).sample(len(dataset.x), seed=work.seed)
    else:
        logs, student = plain_training(settings, cell, teacher, work.seed)
        samples = one_step(student, standard_normal((len(dataset.x), 2), make_generator(work.seed, "healthy/samples")))
    kept = {name: summary(values) for name, values in logs.items() if values}
    return {
        "logs": kept,
        "updates": settings.student_updates,
        "distance": _distance(dataset, samples),
        "spread": samples.std().item(),
    }


@torch.no_grad()
def one_step(field: nn.Module, noise: Tensor) -> Tensor:
    """Samples of one step from ``noise`` ``[B, 2]``."""
    return noise - field(noise, torch.ones(len(noise)))  # type: ignore[no-any-return]


def _distance(dataset: Dataset, samples: Tensor) -> float:
    return sliced_wasserstein(all_rows(dataset.x), samples)


def plain_training(
    settings: HealthySettings, cell: str, teacher: nn.Module, seed: int
) -> tuple[dict[str, list[float]], nn.Module]:
    """Mean Flow Distillation in a loop of its own; returns the logs and the student."""
    student, auxiliary = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    of_student = torch.optim.Adam(student.parameters(), settings.plain_rate)
    of_auxiliary = torch.optim.Adam(auxiliary.parameters(), 1e-3)
    logs: dict[str, list[float]] = {name: [] for name in (*LOGGED, "auxiliary_loss")}
    shape, generator = (settings.batch_size, 2), make_generator(seed, "healthy/plain")
    for _ in range(settings.student_updates):
        for _ in range(0 if cell == "no-auxiliary" else 10):
            data, noise = one_step(student, standard_normal(shape, generator)), standard_normal(shape, generator)
            t = LogitNormal().sample(settings.batch_size, generator)
            loss = flow_matching_loss(auxiliary, data, noise, t, {})
            _update(of_auxiliary, loss, auxiliary)
        if cell != "no-auxiliary":
            logs["auxiliary_loss"].append(loss.item())
        z, noise = standard_normal(shape, generator), standard_normal(shape, generator)
        t, r = sample_pairs(LogitNormal(), settings.batch_size, generator=generator)
        data = z - student(z, torch.ones(len(z)))
        x_t = interpolate(data, noise, t)
        gap = mean_velocity(teacher, x_t.detach(), t, r, step_size=settings.step_size)
        gap -= (
            conditional_velocity(data.detach(), noise)
            if cell == "no-auxiliary"
            else mean_velocity(auxiliary, x_t.detach(), t, r, step_size=settings.step_size)
        )
        norm = _update(of_student, surrogate_loss(x_t, gap), student)
        if cell == "bfloat16-weights":
            for weight in student.parameters():
                weight.data = weight.data.bfloat16().float()
        for name, value in zip(LOGGED, (gap.square().mean().sqrt(), data.std(), norm), strict=True):
            logs[name].append(value.item())
    return logs, student


def summary(values: list[float]) -> Result:
    """Medians of the first and of the last tenth of a log, and a curve of rolling medians for the figure."""
    tenth = max(1, len(values) // 10)
    first, last = (sorted(part)[len(part) // 2] for part in (values[:tenth], values[-tenth:]))
    return {"first": first, "last": last, "curve": thinned(smoothed(values, max(3, len(values) // 20)))}


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, module: nn.Module) -> Tensor:
    """One update; the norm of the gradient."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    return norm


def figure(results: Results, theme: Theme) -> "Figure":
    """Gap, spread of the samples and auxiliary loss of every run."""
    panels = {"velocity_gap": "velocity_gap", "sample_std": "sample_std", "auxiliary_loss": "auxiliary loss"}
    drawing, axes = new_figure(13.0, 3.6, 3)
    for axis, (name, words) in zip(axes, panels.items(), strict=True):
        for number, (cell, runs) in enumerate(results.items()):
            if name not in runs[0]["logs"]:
                continue
            curve = runs[0]["logs"][name]["curve"]
            updates = [index * runs[0]["updates"] / (len(curve) - 1 or 1) for index in range(len(curve))]
            style = "--" if cell in PLAIN else "-"
            axis.plot(updates, curve, style, color=theme.phases[number], label=TITLES[cell], linewidth=1.6)
        axis.set(xlabel="student updates", ylabel=words)
        logarithmic(axis, "y")
    axes[0].set_ylim(top=20)
    axes[0].legend(fontsize=8, loc="upper right", ncols=2)
    return drawing


def finding(results: Results) -> str:
    """Of each run where the gap, the spread and the auxiliary's loss begin and end, and what the student is worth."""
    lines = ["medians of the first and last tenth of the logs; spread and distance to the data of the finished student"]
    for cell, runs in results.items():
        parts = []
        for name in (*LOGGED, "auxiliary_loss"):
            found = [run["logs"][name] for run in runs if name in run["logs"]]
            if found:
                first, last = (spread_words([of[side] for of in found]) for side in ("first", "last"))
                parts.append(f"{name} {first} to {last}")
        spread, distance = (spread_words([run[key] for run in runs]) for key in ("spread", "distance"))
        lines.append(f"{TITLES[cell]}: {', '.join(parts)}; spread {spread}, distance {distance}")
    return "\n".join(lines)


HEALTHY = Experiment(
    summary="the logs of good and bad runs: what docs/healthy_run.md shows",
    quick=HealthySettings(teacher_updates=300, student_updates=80, batch_size=128),
    full=HealthySettings(),
    cells=lambda settings: (*TRAINED, *PLAIN),
    run=run,
    figure=figure,
    finding=finding,
)
