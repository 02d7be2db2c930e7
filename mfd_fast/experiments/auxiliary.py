"""Auxiliary: how far it lags behind its student, and what the student is worth, by update ratio and rank.

Cells: ``ratio-N``, N auxiliary updates before each of the student, whole networks; ``rank-R``, student and auxiliary as
low-rank changes of the teacher, at the ratio ``RANK_RATIO``. All on the eight Gaussians, with the same student updates.

The lag is measured at checkpoints along the training. With the student frozen there, the auxiliary that is trained to
convergence is known: over N samples of the student it is the velocity of their mixture of points,

    v(x, t) = (x - E[x0 | x_t = x]) / t,   weights of x0 proportional to exp(-|x - (1-t) x0|^2 / 2 t^2),

which becomes that of the student's law as N grows. Points x_t are made of samples beside the N. The mean square of the
lag is taken against two references of N samples each, ``E <v_A - v_1, v_A - v_2>``, so that their noise drops out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mfd_fast.data import load_dataset
from mfd_fast.data.dataset import all_rows
from mfd_fast.distillation import make_student
from mfd_fast.experiments.base import Experiment, Result, Results, Work, spread_words
from mfd_fast.experiments.drawing import logarithmic
from mfd_fast.experiments.points import distilled, points_settings, trained_teacher
from mfd_fast.finished import load_student
from mfd_fast.metrics.sliced_wasserstein import sliced_wasserstein
from mfd_fast.path import interpolate
from mfd_fast.phases import Phases
from mfd_fast.report.theme import Theme, new_figure
from mfd_fast.run_folder import RunFolder
from mfd_fast.streams import make_generator, standard_normal
from mfd_fast.task import Task
from mfd_fast.training.checkpoint import list_checkpoints, load_checkpoint
from mfd_fast.training.making_roles import make_roles
from mfd_fast.types import VelocityField

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATIO, RANK = "ratio-", "rank-"
RANK_RATIO = 10
TIMES = (0.3, 0.5, 0.7, 0.9)
MOMENTS = 4
"""Checkpoints of a training."""
CHUNK = 256


@dataclass(frozen=True)
class AuxiliarySettings:
    """Sizes of the experiment."""

    ratios: tuple[int, ...] = (1, 2, 5, 10, 20)
    ranks: tuple[int, ...] = (4, 32)
    teacher_updates: int = 800
    student_updates: int = 200
    """A multiple of `MOMENTS`."""
    references: int = 16384
    """N."""
    points: int = 1024
    """For each of the times."""


def cells(settings: AuxiliarySettings) -> tuple[str, ...]:
    """The ratios with whole networks, then the ranks."""
    return (*(f"{RATIO}{ratio}" for ratio in settings.ratios), *(f"{RANK}{rank}" for rank in settings.ranks))


def run(settings: AuxiliarySettings, cell: str, work: Work) -> Result:
    """Lag at every checkpoint, distance of the student to the data, CPU seconds of the training."""
    kind, number = cell.rsplit("-", 1)
    texts = [f"distill.checkpoint_every={settings.student_updates // MOMENTS}", f"distill.keep_checkpoints={MOMENTS}"]
    if kind == RANK.rstrip("-"):
        texts += ["distill.roles=lora", f"distill.lora_rank={number}", f"distill.lora_alpha={number}"]
        texts += [f"distill.cycle_auxiliary={RANK_RATIO}"]
    else:
        texts += [f"distill.cycle_auxiliary={number}"]
    chosen = points_settings(work.seed, settings.teacher_updates, settings.student_updates, 0.05, *texts)
    dataset, clock = load_dataset(chosen.data.name), Phases()
    trained_teacher(chosen, work.folder / "teacher", dataset)
    with clock.phase("distill"):
        training = distilled(chosen, work.folder / cell, work.folder / "teacher")
    real = torch.cat([all_rows(dataset.x), all_rows(dataset.held_out_x)])
    samples = load_student(training.path).sample(len(real), seed=work.seed)
    return {
        "lags": lags(training, settings, work.seed),
        "distance": sliced_wasserstein(real, samples),
        "cpu_seconds": clock.cpu_seconds["distill"],
    }


def lags(training: RunFolder, settings: AuxiliarySettings, seed: int) -> list[float]:
    """rms of the auxiliary's velocity less that of the frozen student's law, at every checkpoint."""
    chosen, teacher = training.read_settings(), training.read_teacher().requires_grad_(False)
    dataset = load_dataset(chosen.data.name)
    roles = make_roles(teacher, chosen.distill, 0)
    student = make_student(roles, Task.from_dataset(dataset, teacher), chosen.distill, torch.device("cpu"))
    found = []
    for path in list_checkpoints(training.distill_checkpoints()):
        checkpoint = load_checkpoint(path)
        for role in ("student", "auxiliary"):
            roles.load_state_dict(role, checkpoint.tensors[role])
        samples = student.sample(2 * settings.references + settings.points, seed=seed)
        first, second, data = samples.split([settings.references, settings.references, settings.points])
        found.append(lag(roles.auxiliary, data, (first, second), make_generator(seed, "auxiliary/points")))
    return found


@torch.no_grad()
def lag(field: VelocityField, data: Tensor, references: tuple[Tensor, Tensor], generator: torch.Generator) -> float:
    """rms over `TIMES` of ``field`` less the velocity of the law of ``data`` ``[n, d]`` and of both ``references``."""
    power = 0.0
    for time in TIMES:
        t = torch.full((len(data),), time)
        x_t = interpolate(data, standard_normal(tuple(data.shape), generator), t)
        first, second = (field(x_t, t) - velocity_of_points(x_t, time, points) for points in references)
        power += (first * second).mean().item() / len(TIMES)
    return math.sqrt(max(0.0, power))


def velocity_of_points(x: Tensor, time: float, points: Tensor) -> Tensor:
    """The velocity at ``x`` ``[B, d]`` for data that are one of ``points`` ``[N, d]``, all as likely."""
    parts = []
    for rows in x.split(CHUNK):
        weights = (torch.cdist(rows, (1 - time) * points).square() / (-2 * time**2)).softmax(1)
        parts.append((rows - weights @ points) / time)
    return torch.cat(parts)


def figure(results: Results, theme: Theme) -> "Figure":
    """Lag and distance over the ratio and over the rank."""
    drawing, axes = new_figure(9.0, 3.2, 2)
    every = [value for runs in results.values() for key in ("lag", "distance") for value in _values(runs, key)]
    for axis, prefix, words in zip(axes, (RATIO, RANK), ("auxiliary updates for one", "rank"), strict=True):
        names = [name for name in results if name.startswith(prefix)]
        numbers = [int(name.removeprefix(prefix)) for name in names]
        for key, colour, label in (
            ("lag", theme.auxiliary, "lag"),
            ("distance", theme.student, "distance to the data"),
        ):
            means = [sum(values) / len(values) for values in (_values(results[name], key) for name in names)]
            axis.plot(numbers, means, "-", color=colour, label=label)
            for name, number in zip(names, numbers, strict=True):
                values = _values(results[name], key)
                axis.plot([number] * len(values), values, "o", color=colour, markersize=4)
        axis.set(xlabel=words, ylim=(0.8 * max(1e-3, min(every)), 1.25 * max(every)))
        logarithmic(axis, "xy")
    axes[0].legend()
    return drawing


def _values(runs: Sequence[Result], key: str) -> list[float]:
    """Of every seed the distance, or the mean lag."""
    return [sum(run["lags"]) / len(run["lags"]) if key == "lag" else run[key] for run in runs]


def finding(results: Results) -> str:
    """Lag, distance and seconds of each cell."""
    parts = []
    for name, runs in results.items():
        kind, number = name.rsplit("-", 1)
        what = f"{number}:1" if kind == "ratio" else f"rank {number} at {RANK_RATIO}:1"
        parts.append(
            f"{what}: lag {spread_words(_values(runs, 'lag'))}, distance {spread_words(_values(runs, 'distance'))}, "
            f"{spread_words(_values(runs, 'cpu_seconds'))} s"
        )
    return (
        "Lag of the auxiliary behind its student right after a student update (rms velocity, mean of the training), "
        f"sliced Wasserstein distance of the student, CPU seconds. {'; '.join(parts)}."
    )


AUXILIARY = Experiment(
    summary="how far the auxiliary lags and what the student is worth, by update ratio and LoRA rank",
    quick=AuxiliarySettings((1, 5, 20), (4, 32), 300, 80, 8192, 512),
    full=AuxiliarySettings(),
    cells=cells,
    run=run,
    figure=figure,
    finding=finding,
)
