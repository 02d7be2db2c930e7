"""From the arguments of a mean velocity to its rollout: checks, runner, finite values, statistics."""

from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast.guidance import Guidance, guide
from mfd_fast.pairing import PairedField
from mfd_fast.partial_guidance import NegativeVelocities, PartlyGuided, check_savings
from mfd_fast.prepared_conditions import prepared
from mfd_fast.rollout import checks
from mfd_fast.rollout.execute import RolloutOptions
from mfd_fast.rollout.finite import bad_rows, defer_check, locate, mark_bad_rows, raise_deferred
from mfd_fast.rollout.problem import Problem
from mfd_fast.rollout.result import Rollout, SuccessfulRollout
from mfd_fast.rollout.runners import Choice, choose_runner
from mfd_fast.types import Condition, RolloutStats, Status, VelocityField


class PairStats(NamedTuple):
    """Statistics of `mean_velocity_pair`. Of a pair that ran as one batch both name the rows that failed in either."""

    teacher: RolloutStats
    auxiliary: RolloutStats


def make_problem(
    field: VelocityField,
    x: Tensor,
    t: float | Tensor,
    r: float | Tensor,
    options: RolloutOptions,
    condition: Condition | None,
    guidance: Guidance,
    name: str = "field",
) -> Problem:
    """The checked arguments of one integration; ``name`` is the field's in messages."""
    if isinstance(field, type) or not callable(field):
        got = f"the class {field.__name__}, not an object of it" if isinstance(field, type) else type(field).__name__
        raise TypeError(f"{name} must be callable as field(x, t, **condition), got {got}")
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


def run(
    problem: Problem, options: RolloutOptions, return_stats: bool, check_finite: bool, choice: Choice | None = None
) -> tuple[Rollout, RolloutStats]:
    """The rollout and its statistics; without ``return_stats`` a row that failed is an error.

    A problem that comes with its ``choice`` of a runner is prepared already (`prepare`).
    """
    raise_deferred()
    if problem.x.shape[0] == 0:
        rows, nothing = torch.zeros(0, dtype=torch.int64, device="cpu"), torch.zeros_like(problem.x)
        choice = Choice(problem, "eager", "the batch is empty")
        return _finish(Rollout(nothing, nothing, rows, rows, rows), None, choice, rows)
    if choice is None:
        problem = prepare(problem, options)
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


def prepare(problem: Problem, options: RolloutOptions) -> Problem:
    """The problem with what depends on conditions alone computed; see `mfd_fast.types.PreparesConditions`."""
    if problem.x.shape[0] == 0:
        return problem
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


def run_as_one_batch(
    field: PairedField,
    first: Problem,
    second: Problem,
    options: RolloutOptions,
    return_stats: bool,
    check_finite: bool,
) -> tuple[Tensor, Tensor, PairStats]:
    """Both fields of a shared backbone in one integration; see `mfd_fast.pairing`."""
    both = first._replace(
        field=field,
        condition={"teacher": first.condition, "auxiliary": second.condition},
        x=torch.stack([first.x, second.x], 1),
        cost=first.cost + second.cost,
    )
    rollout, stats = run(both, options, return_stats, check_finite)
    u_teacher, u_auxiliary = rollout.mean_velocity.unbind(1)
    calls = stats.evaluations // both.cost
    shares = (stats._replace(evaluations=calls * part.cost) for part in (first, second))
    return u_teacher, u_auxiliary, PairStats(*shares)
