"""Mean velocities and end states of velocity fields, with an interval of its own for every row of a batch."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from mfd_fast.guidance import Guidance
from mfd_fast.integration import PairStats, make_problem, prepare, run, run_as_one_batch
from mfd_fast.keywords import Keywords, PairKeywords
from mfd_fast.pairing import paired
from mfd_fast.partial_guidance import PartlyGuided
from mfd_fast.rollout.execute import RolloutOptions, pair_options
from mfd_fast.rollout.finite import raise_deferred
from mfd_fast.rollout.fused import integrate_quickly
from mfd_fast.rollout.runners import choose_pair
from mfd_fast.types import Condition, RolloutStats, VelocityField

if TYPE_CHECKING:
    from typing_extensions import Unpack

_known_options = functools.lru_cache(maxsize=64, typed=True)(RolloutOptions)


def _options(*given: Any) -> RolloutOptions:
    """`RolloutOptions` of positional arguments; the same ones are checked once."""
    try:
        return _known_options(*given)
    except TypeError:  # of a wrong type, or one that has no hash: then this says which
        return RolloutOptions(*given)


@overload
def mean_velocity(
    field: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    *,
    return_stats: Literal[False] = False,
    **keywords: "Unpack[Keywords]",
) -> Tensor: ...


@overload
def mean_velocity(
    field: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    *,
    return_stats: Literal[True],
    **keywords: "Unpack[Keywords]",
) -> tuple[Tensor, RolloutStats]: ...


@overload
def mean_velocity(
    field: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    *,
    return_stats: bool,
    **keywords: "Unpack[Keywords]",
) -> Tensor | tuple[Tensor, RolloutStats]: ...


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
) -> Tensor | tuple[Tensor, RolloutStats]:
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
    quick = integrate_quickly(*arguments)
    if quick is not None:
        return (quick.mean_velocity(), quick.stats()) if return_stats else quick.mean_velocity()
    rollout, stats = run(make_problem(*arguments), options, return_stats, check_finite)
    return (rollout.mean_velocity, stats) if return_stats else rollout.mean_velocity


@overload
def integrate(
    field: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    *,
    return_stats: Literal[False] = False,
    **keywords: "Unpack[Keywords]",
) -> Tensor: ...


@overload
def integrate(
    field: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    *,
    return_stats: Literal[True],
    **keywords: "Unpack[Keywords]",
) -> tuple[Tensor, RolloutStats]: ...


@overload
def integrate(
    field: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    *,
    return_stats: bool,
    **keywords: "Unpack[Keywords]",
) -> Tensor | tuple[Tensor, RolloutStats]: ...


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
) -> Tensor | tuple[Tensor, RolloutStats]:
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
    quick = integrate_quickly(*arguments)
    if quick is not None:
        end = x.detach() + quick.displacement()
        return (end, quick.stats()) if return_stats else end
    rollout, stats = run(make_problem(*arguments), options, return_stats, check_finite)
    with torch.set_grad_enabled(options.with_gradient):
        end = x.to(rollout.displacement.dtype) + rollout.displacement
    return (end, stats) if return_stats else end


@overload
def mean_velocity_pair(
    teacher: VelocityField,
    auxiliary: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    *,
    return_stats: Literal[False] = False,
    **keywords: "Unpack[PairKeywords]",
) -> tuple[Tensor, Tensor]: ...


@overload
def mean_velocity_pair(
    teacher: VelocityField,
    auxiliary: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    *,
    return_stats: Literal[True],
    **keywords: "Unpack[PairKeywords]",
) -> tuple[Tensor, Tensor, PairStats]: ...


@overload
def mean_velocity_pair(
    teacher: VelocityField,
    auxiliary: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    *,
    return_stats: bool,
    **keywords: "Unpack[PairKeywords]",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, PairStats]: ...


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
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, PairStats]:
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
    first = make_problem(teacher, x, t, r, options, condition, guidance, "teacher")
    second = make_problem(auxiliary, x, t, r, other, condition, Guidance(None, 1.0, None, 1), "auxiliary")
    plain = not isinstance(first.field, PartlyGuided)
    both = paired(teacher, auxiliary, guided=first.cost == 2)
    if both is not None and other == options and options.fixed_steps and plain and max_evaluations is None:
        u_teacher, u_auxiliary, stats = run_as_one_batch(both, first, second, options, return_stats, check_finite)
    else:
        raise_deferred()
        first, second = prepare(first, options), prepare(second, other)
        choices = choose_pair(first, options, second, other)
        teacher_rollout, teacher_stats = run(first, options, return_stats, check_finite, choices[0])
        auxiliary_rollout, auxiliary_stats = run(second, other, return_stats, check_finite, choices[1])
        u_teacher, u_auxiliary = teacher_rollout.mean_velocity, auxiliary_rollout.mean_velocity
        stats = PairStats(teacher_stats, auxiliary_stats)
    return (u_teacher, u_auxiliary, stats) if return_stats else (u_teacher, u_auxiliary)
