"""Which solver and step size are worth their evaluations for a given field, found by trying them on a few rows."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfd_fast.mean_velocity import mean_velocity, mean_velocity_pair
from mfd_fast.types import Condition, VelocityField

REFERENCE_STEP = 0.01
BASELINE = ("euler", {"step_size": 0.02})
"""What the paper and its released code use (arXiv 2606.11155)."""

_Option = dict[str, Any]
CANDIDATES: tuple[tuple[str, _Option], ...] = (
    *(("euler", {"step_size": h}) for h in (0.1, 0.05, 0.02, 0.01)),
    *(("ab2", {"step_size": h}) for h in (0.2, 0.1, 0.05, 0.025)),
    *(("midpoint", {"step_size": h}) for h in (0.2, 0.1, 0.05)),
    *(("heun", {"step_size": h}) for h in (0.2, 0.1, 0.05)),
    *(("rk4", {"step_size": h}) for h in (0.4, 0.2, 0.1)),
    *(("bosh3", {"rtol": tol, "atol": tol}) for tol in (1e-1, 1e-2, 1e-3)),
)

SAVINGS: tuple[_Option, ...] = (
    *({"negative_every": n} for n in (2, 3, 4)),
    *({"guidance_interval": interval} for interval in ((0.1, 0.9), (0.2, 1.0), (0.0, 0.8))),
)
"""Tried with guided fields, each on top of the solvers of `SAVED`."""
SAVED: tuple[tuple[str, _Option], ...] = (BASELINE, ("ab2", {"step_size": 0.05}))


class Trial(NamedTuple):
    """One solver with its options, tried."""

    solver: str
    options: dict[str, Any]
    evaluations: float
    """Mean evaluations of a row, teacher and auxiliary together; a guided one counts as 2."""
    error: float
    """Root mean square error over all rows, relative to what is integrated."""


class Recommendation(NamedTuple):
    """What was tried and what to take."""

    best: Trial | None
    """None when nothing that was tried fits."""
    trials: list[Trial]
    """Cheapest first."""
    reference_error: float
    """Estimated error of the solution that the others are compared with; smaller errors mean nothing."""

    def table(self) -> str:
        """The trials as aligned text; an arrow marks the best."""
        texts = [", ".join(option_texts(trial.options)) for trial in self.trials]
        width = max([24, *map(len, texts)])
        lines = [f"   {'solver':10} {'options':{width}} {'evaluations':>11} {'error':>9}"]
        for trial, options in zip(self.trials, texts, strict=True):
            mark = "->" if trial == self.best else "  "
            lines.append(f"{mark} {trial.solver:10} {options:{width}} {trial.evaluations:11.1f} {trial.error:9.1e}")
        return "\n".join(lines)


def option_texts(options: _Option) -> list[str]:
    """``name=value`` of each option, as a setting takes it."""
    numbers = {name: value if isinstance(value, tuple) else (value,) for name, value in options.items()}
    texts = {name: ", ".join(f"{value:g}" for value in values) for name, values in numbers.items()}
    return [f"{name}=[{text}]" if len(numbers[name]) > 1 else f"{name}={text}" for name, text in texts.items()]


def recommend(
    field: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    *,
    auxiliary: VelocityField | None = None,
    max_error: float | None = None,
    max_evaluations: float | None = None,
    condition: Condition | None = None,
    negative_condition: Condition | None = None,
    guidance_scale: float | Tensor = 1.0,
    field_dtype: torch.dtype | None = None,
) -> Recommendation:
    """Try solvers and step sizes on ``x`` and recommend one.

    With ``max_error`` the cheapest that is at least so accurate, with ``max_evaluations`` the most accurate that costs
    at most so much, with neither the cheapest that is no worse than Euler steps of 0.02. Under guidance, options that
    save evaluations of it are tried as well (``guidance_interval``, ``negative_every``). The errors are against
    fourth-order steps of 0.01, whose own error is estimated from steps of 0.02 (Richardson: a fifteenth of the
    difference).

    Args:
        field: the field to integrate, the teacher of a pair.
        x: ``[B, ...]``, states at t; 32 rows or more give a stable answer.
        t: start: a number, a 0-d tensor or ``[B]``, drawn as in the training.
        r: end, likewise.
        auxiliary: with it the error is that of ``u_teacher - u_auxiliary``, the student's gradient.
        max_error: largest relative error.
        max_evaluations: largest mean number of evaluations of a row.
        condition: as in `mfd_fast.mean_velocity`.
        negative_condition: as in `mfd_fast.mean_velocity`.
        guidance_scale: as in `mfd_fast.mean_velocity`.
        field_dtype: as in `mfd_fast.mean_velocity`.

    Raises:
        TypeError, ValueError: as `mfd_fast.mean_velocity`; or both limits were given, or one is not positive.
    """
    if max_error is not None and max_evaluations is not None:
        raise ValueError(f"give max_error or max_evaluations, not both, got {max_error} and {max_evaluations}")
    for name, limit in (("max_error", max_error), ("max_evaluations", max_evaluations)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{name} must be positive, got {limit}")
    shared: dict[str, Any] = {
        "condition": condition,
        "negative_condition": negative_condition,
        "guidance_scale": guidance_scale,
        "field_dtype": field_dtype,
        "return_stats": True,
    }

    def solve(solver: str, options: _Option) -> tuple[Tensor, float]:
        arguments: dict[str, Any] = dict(options)
        if auxiliary is None:
            u, stats = mean_velocity(field, x, t, r, solver=solver, **shared, **arguments)
            return u, float(stats.evaluations.double().mean())
        teacher, other, pair = mean_velocity_pair(field, auxiliary, x, t, r, solver=solver, **shared, **arguments)
        return teacher - other, float((pair.teacher.evaluations + pair.auxiliary.evaluations).double().mean())

    fine, _ = solve("rk4", {"step_size": REFERENCE_STEP})
    coarse, _ = solve("rk4", {"step_size": 2 * REFERENCE_STEP})
    trials = []
    guided = isinstance(guidance_scale, Tensor) or guidance_scale != 1.0
    savings = [(solver, options | saving) for solver, options in SAVED for saving in SAVINGS] if guided else []
    for solver, options in (*CANDIDATES, *savings):
        u, evaluations = solve(solver, options)
        trials.append(Trial(solver, options, evaluations, _relative(u, fine)))
    trials.sort(key=lambda trial: (trial.evaluations, trial.error))
    return Recommendation(_best(trials, max_error, max_evaluations), trials, _relative(coarse, fine) / 15)


def _best(trials: list[Trial], max_error: float | None, max_evaluations: float | None) -> Trial | None:
    if max_evaluations is not None:
        affordable = [trial for trial in trials if trial.evaluations <= max_evaluations]
        return min(affordable, key=lambda trial: trial.error, default=None)
    if max_error is None:
        max_error = next(trial.error for trial in trials if (trial.solver, trial.options) == BASELINE)
    return next((trial for trial in trials if trial.error <= max_error), None)


def _relative(u: Tensor, reference: Tensor) -> float:
    return float((u - reference).norm() / reference.norm().clamp(min=torch.finfo(reference.dtype).tiny))
