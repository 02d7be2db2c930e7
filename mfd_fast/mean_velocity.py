"""Mean velocities and end states of velocity fields, with an interval of its own for every row of a batch."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfd_fast.guidance import guide
from mfd_fast.pairing import PairedField, paired
from mfd_fast.partial_guidance import NegativeVelocities, PartlyGuided, check_savings
from mfd_fast.preparing import prepared
from mfd_fast.rollout import checks
from mfd_fast.rollout.execute import RolloutOptions, pair_options
from mfd_fast.rollout.finite import bad_rows, defer_check, locate, mark_bad_rows, raise_deferred
from mfd_fast.rollout.fused import integrate_quickly
from mfd_fast.rollout.problem import Problem
from mfd_fast.rollout.result import Rollout, SuccessfulRollout
from mfd_fast.rollout.runners import Choice, choose_pair, choose_runner
from mfd_fast.types import Condition, RolloutStats, Status, VelocityField

_options = functools.lru_cache(maxsize=64, typed=True)(RolloutOptions)
"""`RolloutOptions` of positional arguments; the same ones are checked once."""


class PairStats(NamedTuple):
    """Statistics of `mean_velocity_pair`. Of a pair that ran as one batch both name the rows that failed in either."""

    teacher: RolloutStats
    auxiliary: RolloutStats


class Guidance(NamedTuple):
    """The arguments of guidance."""

    negative_condition: Condition | None
    scale: float | Tensor
    interval: Sequence[float] | None
    every: int


def mean_velocity(
    field: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    *,
    step_size: float | None = None,
    steps: int | None = None,
    solver: str = "euler",
    rtol: float | None = None,
    atol: float | None = None,
    max_evaluations: int | None = None,
    max_rows: int | None = None,
    condition: Condition | None = None,
    negative_condition: Condition | None = None,
    guidance_scale: float | Tensor = 1.0,
    guidance_interval: Sequence[float] | None = None,
    negative_every: int = 1,
    field_dtype: torch.dtype | None = None,
    runner: str = "auto",
    differentiable: bool = False,
    return_stats: bool = False,
    check_finite: bool = True,
) -> Any:
    """The mean velocity ``u(x, t, r) = (x(r) - x(t)) / (r - t)`` of the trajectory of ``field`` through ``(x, t)``.

    ``r < t`` and ``r > t`` both work; ``r == t`` gives the velocity. Each row gets what it would get alone.

    Args:
        field: ``field(x, t, **condition) -> velocity``; it gets t as ``[n]`` float32 (float64 when x is float64).
        x: ``[B, ...]``, the state at t. The integration runs in float32, or float64 when x is float64.
        t: start: a number, a 0-d tensor or ``[B]``.
        r: end: a number, a 0-d tensor or ``[B]``.
        step_size: fixed-step solvers take ``K = max(1, ceil(|t - r| / step_size - 1e-6))`` equal steps in each row
            (default 0.02); for adaptive solvers it is the largest step (default: none).
        steps: the same number of equal steps in every row instead, for any solver.
        solver: euler, midpoint, heun, ab2, rk4; bosh3 (adaptive); torchdiffeq:<method>.
        rtol: relative tolerance of adaptive solvers (default 1e-2).
        atol: absolute tolerance of adaptive solvers (default 1e-2).
        max_evaluations: ends a row that has used up so many evaluations (a guided one counts as 2); the default lets
            fixed steps finish and ends an adaptive row with an unreachable tolerance.
        max_rows: network rows computed at once, where memory is short; a guided sample takes 2, and a pair on one
            backbone takes the rows of both. A row that ends makes room for the longest one waiting (adaptive solvers
            and ``differentiable`` compute one part of the batch after the other). The default computes all together.
        condition: keyword arguments of the field; tensors have leading dimension B, or 1 to be shared by all rows.
        negative_condition: what guidance pushes away from; names it lacks are taken from ``condition``.
        guidance_scale: 1.0 is off; a number or ``[B]``.
        guidance_interval: ``(low, high)``: guidance only at these times, none outside (default: everywhere).
        negative_every: a velocity under ``negative_condition`` serves so many evaluations of its row. Both options save
            evaluations, change the result and read from the device once an evaluation; `mfd_fast.recommend` measures
            what they cost.
        field_dtype: dtype in which the field gets x (default: the dtype of x); its output is cast up.
        runner: "eager" is the definition; "compiled" runs a compiled copy of the field that shares its weights; "fused"
            runs all steps of an MLP (euler, ab2; float32) in one call; "captured" replays CUDA graphs, which contain
            the numbers that the network's attributes had when they were recorded; "auto" does what `mfd_fast.warmup`
            has found fastest, and never compiles or records by itself.
        differentiable: back-propagate through the solver; otherwise the result is a constant.
        return_stats: also return a `RolloutStats`, and report rows that failed there instead of raising.
        check_finite: False leaves it to the caller to look for NaN and infinity in the result of fixed steps; on CUDA
            statistics then cost no wait for the device.

    Returns:
        ``[B, ...]`` in float32 (float64 when x is float64). For a row that ended early it is the mean velocity over the
        part it covered. With ``return_stats`` a tuple of that and the statistics.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        FloatingPointError: a velocity was not finite (on CUDA raised by a later call; the host never waits).
        RuntimeError: a row ended early for another reason.

    Source: Mean Flow Distillation, arXiv 2606.11155; the field evaluations are those of its integral.
    """
    options = _options(
        step_size, steps, solver, rtol, atol, max_evaluations, field_dtype, runner, differentiable, max_rows
    )
    guidance = Guidance(negative_condition, guidance_scale, guidance_interval, negative_every)
    arguments = (field, x, t, r, options, condition, guidance)
    rollout, stats = _run_quickly(*arguments) or _run(_problem(*arguments), options, return_stats, check_finite)
    return (rollout.mean_velocity, stats) if return_stats else rollout.mean_velocity


def integrate(
    field: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    *,
    step_size: float | None = None,
    steps: int | None = None,
    solver: str = "euler",
    rtol: float | None = None,
    atol: float | None = None,
    max_evaluations: int | None = None,
    max_rows: int | None = None,
    condition: Condition | None = None,
    negative_condition: Condition | None = None,
    guidance_scale: float | Tensor = 1.0,
    guidance_interval: Sequence[float] | None = None,
    negative_every: int = 1,
    field_dtype: torch.dtype | None = None,
    runner: str = "auto",
    differentiable: bool = False,
    return_stats: bool = False,
    check_finite: bool = True,
) -> Any:
    """The state ``x(r)`` of the trajectory of ``field`` through ``(x, t)``; arguments and errors of `mean_velocity`.

    Returns:
        ``[B, ...]`` in float32 (float64 when x is float64); for a row that ended early the state it reached. With
        ``return_stats`` a tuple of that and the statistics.
    """
    options = _options(
        step_size, steps, solver, rtol, atol, max_evaluations, field_dtype, runner, differentiable, max_rows
    )
    guidance = Guidance(negative_condition, guidance_scale, guidance_interval, negative_every)
    arguments = (field, x, t, r, options, condition, guidance)
    rollout, stats = _run_quickly(*arguments) or _run(_problem(*arguments), options, return_stats, check_finite)
    with torch.set_grad_enabled(options.with_gradient):
        end = x.to(rollout.displacement.dtype) + rollout.displacement
    return (end, stats) if return_stats else end


def mean_velocity_pair(
    teacher: VelocityField,
    auxiliary: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    *,
    step_size: float | None = None,
    steps: int | None = None,
    solver: str = "euler",
    rtol: float | None = None,
    atol: float | None = None,
    max_evaluations: int | None = None,
    max_rows: int | None = None,
    condition: Condition | None = None,
    negative_condition: Condition | None = None,
    guidance_scale: float | Tensor = 1.0,
    guidance_interval: Sequence[float] | None = None,
    negative_every: int = 1,
    field_dtype: torch.dtype | None = None,
    runner: str = "auto",
    differentiable: bool = False,
    return_stats: bool = False,
    check_finite: bool = True,
    auxiliary_solver: str | None = None,
    auxiliary_step_size: float | None = None,
) -> Any:
    """The mean velocities of teacher and auxiliary from the same point, the two terms of Mean Flow Distillation.

    Arguments and errors are those of `mean_velocity`; both fields get ``condition``, only the teacher is guided. Fields
    that share a backbone (`SharedBackbone`) run as one batch when they take the same fixed steps.

    Args:
        teacher: the frozen teacher.
        auxiliary: the field that tracks the student's distribution.
        x: ``[B, ...]``, the state at t.
        t: start: a number, a 0-d tensor or ``[B]``.
        r: end: a number, a 0-d tensor or ``[B]``.
        auxiliary_solver: solver of the auxiliary (default: ``solver``); rtol and atol go to those that are adaptive.
        auxiliary_step_size: step size of the auxiliary (default: ``step_size``).

    Returns:
        ``(u_teacher, u_auxiliary)``, ``[B, ...]`` each; with ``return_stats`` a `PairStats` as third element.

    Source: arXiv 2606.11155, the mean velocities of its student objective.
    """
    options, other = pair_options(
        step_size=step_size,
        steps=steps,
        solver=solver,
        rtol=rtol,
        atol=atol,
        max_evaluations=max_evaluations,
        max_rows=max_rows,
        field_dtype=field_dtype,
        runner=runner,
        differentiable=differentiable,
        auxiliary_solver=auxiliary_solver,
        auxiliary_step_size=auxiliary_step_size,
    )
    guidance = Guidance(negative_condition, guidance_scale, guidance_interval, negative_every)
    first = _problem(teacher, x, t, r, options, condition, guidance)
    second = _problem(auxiliary, x, t, r, other, condition, Guidance(None, 1.0, None, 1))
    plain = not isinstance(first.field, PartlyGuided)
    both = paired(teacher, auxiliary, guided=first.cost == 2)
    if both is not None and other == options and options.fixed_steps and plain and max_evaluations is None:
        return _run_as_one_batch(both, first, second, options, return_stats, check_finite)
    raise_deferred()
    choices = choose_pair(first, options, second, other)
    teacher_rollout, teacher_stats = _run(first, options, return_stats, check_finite, choices[0])
    auxiliary_rollout, auxiliary_stats = _run(second, other, return_stats, check_finite, choices[1])
    velocities = (teacher_rollout.mean_velocity, auxiliary_rollout.mean_velocity)
    return (*velocities, PairStats(teacher_stats, auxiliary_stats)) if return_stats else velocities


def _problem(
    field: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    options: RolloutOptions,
    condition: Condition | None,
    guidance: Guidance,
) -> Problem:
    """The checked arguments of one integration."""
    if not callable(field):
        raise TypeError(f"field must be callable as field(x, t, **condition), got {type(field).__name__}")
    checks.check_x(x)
    times = checks.check_times(t, r, x, field)
    field_dtype = checks.resolve_field_dtype(field, x, options.field_dtype)
    rows = checks.check_condition("condition", condition, x)
    negative = None
    if guidance.negative_condition is not None:
        negative = checks.check_condition("negative_condition", guidance.negative_condition, x)
    state = x.to(checks.state_dtype(x))
    interval = check_savings(guidance.interval, guidance.every)
    guided, arguments, cost = guide(field, rows, negative, guidance.scale, state)
    if interval is not None and cost == 2:
        guided = PartlyGuided(field, interval, guidance.every, NegativeVelocities(state))
        arguments = {**arguments, "row": torch.arange(state.shape[0], device=state.device)}
    return Problem(guided, arguments, state, times, field_dtype, cost)


def _run_quickly(
    field: VelocityField,
    x: Any,
    t: Any,
    r: Any,
    options: RolloutOptions,
    condition: Condition | None,
    guidance: Guidance,
) -> tuple[Rollout, RolloutStats] | None:
    """The rollout of the plainest arguments of `_problem` by the fused runner, or None."""
    if guidance.interval is not None or guidance.every != 1:
        return None
    quick = integrate_quickly(field, x, t, r, options, condition, guidance.negative_condition, guidance.scale)
    if quick is None:
        return None
    rollout, cost, reason = quick
    evaluations = rollout.calls if cost == 1 else rollout.calls * cost
    return rollout, RolloutStats(evaluations, rollout.steps, rollout.status, "fused", reason, None)


def _run(
    problem: Problem, options: RolloutOptions, return_stats: bool, check_finite: bool, choice: Choice | None = None
) -> tuple[Rollout, RolloutStats]:
    """The rollout and its statistics; without ``return_stats`` a row that failed is an error."""
    raise_deferred()
    if problem.x.shape[0] == 0:
        rows, nothing = torch.zeros(0, dtype=torch.int64), torch.zeros_like(problem.x)
        choice = Choice(problem, "eager", "the batch is empty")
        return _finish(Rollout(nothing, nothing, rows, rows, rows), None, choice, rows)
    if choice is None:
        problem = _prepared(problem, options)
        choice = choose_runner(problem, options)
    rollout = choice.run(choice.problem, options)
    evaluations = _evaluations(choice.problem, rollout, return_stats)
    if isinstance(rollout, SuccessfulRollout):
        return _finish(rollout, None, choice, evaluations)
    if not check_finite:
        if not return_stats:
            _raise_unless_successful(rollout, None)
        return _finish(rollout, None, choice, evaluations)
    bad = bad_rows(rollout)
    if problem.x.is_cuda and not return_stats:  # pragma: no cover (gpu)
        defer_check(bad)
        _raise_unless_successful(rollout, None)
        return _finish(rollout, None, choice, evaluations)
    first_bad = None
    if bool(bad.any()):
        rollout = mark_bad_rows(rollout, bad)
        row = int(bad.nonzero()[0])
        first_bad = (row, locate(problem, options, row))
    if not return_stats:
        _raise_unless_successful(rollout, first_bad)
    return _finish(rollout, first_bad, choice, evaluations)


def _prepared(problem: Problem, options: RolloutOptions) -> Problem:
    """The problem with what depends on conditions alone computed; see `mfd_fast.types.PreparesConditions`."""
    with torch.set_grad_enabled(options.with_gradient):
        (condition,) = prepared([(problem.field, problem.condition)])
    return problem._replace(condition=condition)


def _raise_unless_successful(rollout: Rollout, first_bad: tuple[int, float] | None) -> None:
    hint = "pass return_stats=True to get the other rows and a status for each"
    if first_bad is not None:
        row, time = first_bad
        raise FloatingPointError(f"the field returned NaN or infinity in row {row} at time {time:g}; {hint}")
    failed = (rollout.status != Status.SUCCESS).nonzero().flatten()
    if failed.numel():
        row = int(failed[0])
        raise RuntimeError(f"row {row} did not reach r: {Status(int(rollout.status[row])).message} ({hint})")


def _evaluations(problem: Problem, rollout: Rollout, wanted: bool) -> Tensor:
    """``[B]`` int64 on the CPU: rows that the network computed; counted on the device where that depends on times."""
    if wanted and isinstance(problem.field, PartlyGuided):
        return rollout.calls + problem.field.memory.evaluated.cpu()
    return rollout.calls * problem.cost


def _finish(
    rollout: Rollout, first_bad: tuple[int, float] | None, choice: Choice, evaluations: Tensor
) -> tuple[Rollout, RolloutStats]:
    stats = RolloutStats(evaluations, rollout.steps, rollout.status, choice.runner, choice.reason, first_bad)
    return rollout, stats


def _run_as_one_batch(
    field: PairedField,
    first: Problem,
    second: Problem,
    options: RolloutOptions,
    return_stats: bool,
    check_finite: bool,
) -> Any:
    """Both fields of a shared backbone in one integration; see `mfd_fast.pairing`."""
    both = first._replace(
        field=field,
        condition={"teacher": first.condition, "auxiliary": second.condition},
        x=torch.stack([first.x, second.x], 1),
        cost=first.cost + second.cost,
    )
    rollout, stats = _run(both, options, return_stats, check_finite)
    velocities = rollout.mean_velocity.unbind(1)
    if not return_stats:
        return velocities
    calls = stats.evaluations // both.cost
    shares = (stats._replace(evaluations=calls * part.cost) for part in (first, second))
    return (*velocities, PairStats(*shares))
