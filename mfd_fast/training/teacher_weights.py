"""A teacher with 8 bits in the rollouts of student updates, behind a gate that measures what that does to the gradient.

The gradient of Mean Flow Distillation is u_teacher - u_auxiliary. An error of the teacher alone goes into it whole, and
counts for more the closer the auxiliary comes to the teacher. The error of the solver goes into it anyhow. So the gate
asks that 8 bits change the gradient no more than the solver does, in two respects: row by row, and in the mean over the
batch, which no learning rate averages out. Without guidance the gradient of new roles is zero, and nothing passes.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfd_fast.config import DistillSettings
from mfd_fast.fields import autocast
from mfd_fast.mean_velocity import mean_velocity_pair
from mfd_fast.methods.base import MethodOptions
from mfd_fast.models.low_precision import low_precision_copy
from mfd_fast.path import interpolate
from mfd_fast.solvers import get_solver
from mfd_fast.step_control import DEFAULT_STEP_SIZE, AdaptiveSteps
from mfd_fast.storage import read_json, write_json
from mfd_fast.streams import RowDraws, Share, make_generator
from mfd_fast.student import Student
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.context import Context
from mfd_fast.training.optimizing import PRECISIONS
from mfd_fast.types import VelocityField

ROWS = 16
"""Samples that the gate looks at, or more: whole parts of a backward pass."""
FILE_NAME = "teacher_weights.json"
"""In a run's folder: what was measured, in the order of the updates."""


class Measured(NamedTuple):
    """Relative errors of the gradient u_teacher - u_auxiliary over some rows."""

    error: float
    """Of 8 bits: norm of the change over the norm of the gradient."""
    bias: float
    """Norm of the mean change over the root mean square norm of a row's gradient."""
    solver_error: float
    """The same of the solver, against a quarter of its step size."""
    solver_bias: float

    @property
    def passes(self) -> bool:
        """Whether both errors are at most the solver's; never where something is not finite."""
        return self.error <= self.solver_error and self.bias <= self.solver_bias and math.isfinite(self.solver_error)

    @property
    def words(self) -> str:
        """All four numbers."""
        return (
            f"8 bits change the gradient by {self.error:.2g} of itself, {self.bias:.2g} in the mean over rows; "
            f"the solver's error is {self.solver_error:.2g}, {self.solver_bias:.2g} in the mean"
        )


class GateInputs(NamedTuple):
    """What student updates compute with."""

    student: Student
    conditions: ConditionTable
    options: MethodOptions
    rows: int
    """Samples of a backward pass."""
    seed: int


class LowPrecisionTeacher:
    """The teacher in 8 bits and the gate before it.

    Args:
        teacher: the frozen network, which stays: the other roles may share it, and the gate compares with it.
        settings: ``teacher_weights`` is "int8" or "fp8".
        folder: of the run; gets a list of what was measured.
    """

    def __init__(self, teacher: nn.Module, settings: DistillSettings, folder: Path) -> None:
        self.kind = settings.teacher_weights
        self.field = autocast(low_precision_copy(teacher, self.kind), PRECISIONS[settings.precision])
        self._file, self._every = folder / FILE_NAME, settings.checkpoint_every
        self._measured_at: int | None = None

    def due(self, student_updates: int) -> bool:
        """Whether to measure after so many student updates: first of all, then with checkpoints 1, 2, 4, 8 and so on.

        A measurement costs about as much as a hundred student updates' rollouts.
        """
        if self._measured_at is None:
            return True
        if self._every == 0 or student_updates == self._measured_at:
            return False
        checkpoints, rest = divmod(student_updates, self._every)
        return checkpoints > 0 and rest == 0 and checkpoints & (checkpoints - 1) == 0

    def check(
        self,
        student_updates: int,
        teacher: VelocityField,
        auxiliary: VelocityField,
        inputs: GateInputs,
        context: Context,
    ) -> None:
        """Measure, note and say it; ValueError in all processes if it does not pass in one of them."""
        self._measured_at = student_updates
        setting, main = f"distill.teacher_weights {self.kind!r}", context.world.is_main
        if main:
            print(f"distillation: measuring {setting}", flush=True)
        measured = measure(teacher, self.field, auxiliary, inputs, context)
        refused = context.world.any(not measured.passes)
        if main:
            numbers = {name: value if math.isfinite(value) else None for name, value in measured._asdict().items()}
            entry = {"student_updates": student_updates, "kind": self.kind} | numbers
            write_json(self._file, [*(read_json(self._file) if self._file.is_file() else []), entry])
        if refused:
            then = "start" if student_updates == 0 else "go on from the last checkpoint"
            raise ValueError(
                f"{setting} is refused after {student_updates} student updates: {measured.words}; {then} with --set "
                f"distill.teacher_weights=float"
            )
        if main:
            print(f"distillation: {measured.words}", flush=True)


def low_precision_teacher(teacher: nn.Module, settings: DistillSettings, folder: Path) -> LowPrecisionTeacher | None:
    """The teacher that the settings want in rollouts; None for the teacher as it is."""
    return None if settings.teacher_weights == "float" else LowPrecisionTeacher(teacher, settings, folder)


@torch.no_grad()
def measure(
    teacher: VelocityField, low: VelocityField, auxiliary: VelocityField, inputs: GateInputs, context: Context
) -> Measured:
    """Compare gradients with ``low`` in place of ``teacher``, on the same rows whenever it is called."""
    options = inputs.options
    finer = finer_rollout(options.rollout)
    parts = []
    for x_t, t, r, condition in _points(inputs, context):
        shared: dict[str, Any] = {
            "condition": condition,
            "negative_condition": inputs.conditions.negative(context.device),
            "guidance_scale": options.guidance_scale,
            "check_finite": False,
        }
        gaps = []
        for field, rollout in ((teacher, options.rollout), (low, options.rollout), (teacher, finer)):
            u_teacher, u_auxiliary = mean_velocity_pair(field, auxiliary, x_t, t, r, **shared, **rollout)
            gaps.append((u_teacher - u_auxiliary).flatten(1).double())
        parts.append(gaps)
    plain, coarse, fine = (torch.cat(gaps) for gaps in zip(*parts, strict=True))
    error, bias = relative_errors(coarse - plain, plain)
    solver_error, solver_bias = relative_errors(plain - fine, plain)
    return Measured(error, bias, solver_error, solver_bias)


def _points(inputs: GateInputs, context: Context) -> Iterator[tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]]:
    """``x_t, t, r, condition`` of points as student updates draw them, in parts."""
    share, device, shape = Share(inputs.rows, 0, inputs.rows), context.device, inputs.student.sample_shape
    for part in range(math.ceil(ROWS / inputs.rows)):
        draws = RowDraws(make_generator(inputs.seed, "teacher-weights", part), share, device)
        condition = inputs.conditions.draw(part, share, device)
        data = inputs.student.generate(draws.normal(shape), condition, fresh=partial(draws.normal, shape))
        t, r = draws.pairs(inputs.options.pair_law, inputs.options.equal_share)
        yield interpolate(data, draws.normal(shape), t.to(device, non_blocking=True)), t, r, condition


def relative_errors(change: Tensor, gradient: Tensor) -> tuple[float, float]:
    """The norm of ``change`` ``[N, D]`` over that of ``gradient``, and of its mean over the mean square row of it."""
    size = gradient.norm()
    return float(change.norm() / size), float(change.mean(0).norm() / (size / math.sqrt(len(gradient))))


def finer_rollout(rollout: Mapping[str, Any]) -> dict[str, Any]:
    """Options with a quarter of the steps' size, or a tenth of the tolerances.

    At order p that leaves 4^-p of the error (Richardson), so the difference is 1 - 4^-p of it: three quarters for
    Euler. That is not made up for, so the gate is a little stricter than it must be.
    """
    solvers = [get_solver(name) for name in (rollout["solver"], rollout["auxiliary_solver"]) if name is not None]
    finer = dict(rollout)
    if rollout["steps"] is not None:
        finer["steps"] = 4 * rollout["steps"]
    elif all(solver.error_order is None for solver in solvers):
        finer["step_size"] = (rollout["step_size"] or DEFAULT_STEP_SIZE) / 4
    else:
        usual = asdict(AdaptiveSteps())
        finer |= {name: (rollout[name] or usual[name]) / 10 for name in ("rtol", "atol")}
    if rollout["auxiliary_step_size"] is not None:
        finer["auxiliary_step_size"] = rollout["auxiliary_step_size"] / 4
    return finer
