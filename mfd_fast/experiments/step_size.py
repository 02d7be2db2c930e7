"""Step size: error and cost of the mean velocity from 0.5 down to 0.001, with a float32 and with a bfloat16 state.

Fewer, larger steps have a larger truncation error. Small steps in bfloat16 lose their updates: one below half a unit in
the last place of x changes nothing. Cells: ``gaussian`` (exact field, exact answer), ``network`` (a trained teacher on
the eight Gaussians against Runge-Kutta steps in float64), and with a budget for it ``quality-H``: students distilled
with step size H, their sliced Wasserstein distance to the data.
"""

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfd_fast.data import load_dataset
from mfd_fast.data.dataset import all_rows
from mfd_fast.experiments.affine import MEAN, STD, TEACHER
from mfd_fast.experiments.base import Experiment, Result, Results, Work, spread_words
from mfd_fast.experiments.drawing import logarithmic
from mfd_fast.experiments.points import distilled, points_settings, trained_teacher
from mfd_fast.mean_velocity import mean_velocity
from mfd_fast.metrics.sliced_wasserstein import sliced_wasserstein
from mfd_fast.path import interpolate
from mfd_fast.phases import Phases
from mfd_fast.report.theme import Theme, new_figure
from mfd_fast.run_folder import RunFolder
from mfd_fast.streams import make_generator, standard_normal
from mfd_fast.types import VelocityField

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T, R = 0.8, 0.3
QUALITY = "quality-"


@dataclass(frozen=True)
class StepSizeSettings:
    """Sizes of the experiment."""

    step_sizes: tuple[float, ...] = (0.001, 0.005, 0.02, 0.03, 0.1, 0.5)
    rows: int = 1024
    teacher_updates: int = 800
    student_updates: int = 150
    """Of each student; 0 leaves the quality out."""


def cells(settings: StepSizeSettings) -> tuple[str, ...]:
    """The two of errors, then one a step size."""
    quality = settings.step_sizes if settings.student_updates else ()
    return ("gaussian", "network", *(f"{QUALITY}{size:g}" for size in quality))


@torch.no_grad()
def rounded_mean_velocity(field: VelocityField, x: Tensor, step_size: float) -> Tensor:
    """The mean velocity from T to R whose state is rounded to bfloat16 after every Euler step; the field is not.

    ``x`` ``[B, ...]`` holds values of bfloat16.
    """
    steps = math.ceil((T - R) / step_size - 1e-6)
    state = x.to(torch.bfloat16)
    for index in range(steps):
        t = torch.full((len(x),), T - index * (T - R) / steps, dtype=x.dtype)
        state = (state.to(x.dtype) - (T - R) / steps * field(state.to(x.dtype), t)).to(torch.bfloat16)
    return (x - state.to(x.dtype)) / (T - R)


def errors(settings: StepSizeSettings, field: VelocityField, x: Tensor, truth: Tensor) -> Result:
    """By step size the rms errors of both states, what the rounding alone does, evaluations a row and seconds."""
    found: dict[str, list[float]] = {"float32": [], "bfloat16": [], "rounding": [], "evaluations": [], "seconds": []}
    for size in settings.step_sizes:
        clock = Phases()
        with clock.phase("rollout"):
            exact, stats = mean_velocity(field, x, T, R, step_size=size, return_stats=True)
        rounded = rounded_mean_velocity(field, x, size)
        for name, apart in (("float32", exact - truth), ("bfloat16", rounded - truth), ("rounding", rounded - exact)):
            found[name].append(apart.double().square().mean().sqrt().item())
        found["evaluations"].append(stats.evaluations.double().mean().item())
        found["seconds"].append(clock.cpu_seconds["rollout"])
    return {"step_sizes": list(settings.step_sizes), "rms_velocity": truth.square().mean().sqrt().item(), **found}


def run(settings: StepSizeSettings, cell: str, work: Work) -> Result:
    """See the module."""
    generator = make_generator(work.seed, f"step-size/{cell}")
    if cell == "gaussian":
        noise = standard_normal((2, settings.rows, 1), generator)
        x = interpolate(MEAN + STD * noise[0], noise[1], torch.full((settings.rows,), T)).bfloat16().float()
        times = torch.full((2, settings.rows), T, dtype=torch.float64)
        times[1] = R
        return errors(settings, TEACHER, x, TEACHER.mean_velocity(x.double(), *times))
    size = float(cell.removeprefix(QUALITY)) if cell.startswith(QUALITY) else 0.05
    chosen = points_settings(work.seed, settings.teacher_updates, settings.student_updates, size)
    dataset = load_dataset(chosen.data.name)
    if cell == "network":
        teacher: Any = trained_teacher(chosen, work.folder / "teacher", dataset).requires_grad_(False)
        data = all_rows(dataset.x)[: settings.rows]
        noise = standard_normal(tuple(data.shape), generator)
        x = interpolate(data, noise, torch.full((len(data),), T)).bfloat16().float()
        truth = mean_velocity(copy.deepcopy(teacher).double(), x.double(), T, R, solver="rk4", steps=200)
        return errors(settings, teacher, x, truth)
    return quality(distilled(chosen, work.folder / cell, work.folder / "teacher"), work.seed)


def quality(student_run: RunFolder, seed: int) -> Result:
    """The distance of a student's samples to the data, and what its training cost."""
    from mfd_fast.finished import load_student
    from mfd_fast.report.record import read_run

    dataset = load_dataset("mixture-2d")
    real = torch.cat([all_rows(dataset.x), all_rows(dataset.held_out_x)])
    samples = load_student(student_run.path).sample(len(real), seed=seed)
    lines = read_run(student_run.path).student_log
    return {"distance": sliced_wasserstein(real, samples), "seconds": lines[-1]["seconds"]}


def figure(results: Results, theme: Theme) -> "Figure":
    """Errors over the step size, and the quality where it was measured."""
    qualities = {float(name.removeprefix(QUALITY)): found for name, found in results.items() if name[:1] == "q"}
    drawing, axes = new_figure(12.0 if qualities else 9.0, 3.2, 3 if qualities else 2)
    for axis, cell in zip(axes, ("gaussian", "network"), strict=False):
        found = results[cell][0]
        for name, colour in (("float32", theme.student), ("bfloat16", theme.teacher)):
            axis.plot(found["step_sizes"], found[name], "o-", color=colour, label=f"{name} state")
        axis.set(xlabel="step size", ylabel="rms error of u", title=cell)
        logarithmic(axis, "xy")
        axis.legend()
    if qualities:
        means = [sum(run["distance"] for run in found) / len(found) for found in qualities.values()]
        axes[2].plot(list(qualities), means, "o-", color=theme.student)
        axes[2].set(xlabel="step size", ylabel="sliced Wasserstein", title="student", ylim=(0, 1.3 * max(means)))
        logarithmic(axes[2], "x")
    return drawing


def finding(results: Results) -> str:
    """Where each state is best, and what the smallest step costs."""
    text = ""
    for cell in ("gaussian", "network"):
        found = results[cell][0]
        sizes = found["step_sizes"]
        best = {name: min(range(len(sizes)), key=found[name].__getitem__) for name in ("float32", "bfloat16")}
        rounding = ", ".join(f"{error:.2g} at {size:g}" for size, error in zip(sizes, found["rounding"], strict=True))
        text += (
            f"{cell}: with a float32 state the error of u is smallest at step size {sizes[best['float32']]:g} "
            f"({found['float32'][best['float32']]:.2g}), with a bfloat16 state at {sizes[best['bfloat16']]:g} "
            f"({found['bfloat16'][best['bfloat16']]:.2g}). The rounding alone: {rounding}. Evaluations from "
            f"{found['evaluations'][0]:.0f} to {found['evaluations'][-1]:.0f}. "
        )
    for name, runs in results.items():
        if name.startswith(QUALITY):
            distances = spread_words([run["distance"] for run in runs])
            text += f"Student with step size {name.removeprefix(QUALITY)}: distance {distances}. "
    return text.strip()


STEP_SIZE = Experiment(
    summary="smaller steps are better with a float32 state and worse with a bfloat16 state",
    quick=StepSizeSettings(teacher_updates=300, student_updates=0),
    full=StepSizeSettings(),
    cells=cells,
    run=run,
    figure=figure,
    finding=finding,
)
