"""Rollouts of which at most ``max_rows`` network rows are computed at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from mfd_fast.rollout.checks import Times
from mfd_fast.rollout.plan import evaluations_of, make_schedule, steps_within
from mfd_fast.rollout.problem import Problem
from mfd_fast.rollout.program import Program
from mfd_fast.rollout.result import Rollout
from mfd_fast.rollout.slots import Slots, integrate_slots
from mfd_fast.rollout.table import Intervals
from mfd_fast.rows import select_rows
from mfd_fast.solvers import Solver


def row_limit(max_rows: int | None, cost: int, rows: int) -> int:
    """Samples of a batch of ``rows`` that may be computed at once, each as ``cost`` network rows.

    Raises:
        ValueError: not even one sample fits.
    """
    if max_rows is None:
        return rows
    if max_rows < cost:
        raise ValueError(
            f"max_rows must be at least {cost}, the network rows of one sample with guidance and pairing, "
            f"got {max_rows}"
        )
    return min(rows, max_rows // cost)


def intervals_of(problem: Problem, steps: Tensor, solver: Solver, budget: int | None) -> Intervals:
    """The rows of ``problem``, cut into ``steps`` ``[B]``, within ``budget`` evaluations a row."""
    run = steps_within(steps, solver, budget)
    t, r = (time.to(problem.x.dtype).double() for time in (problem.times.host_t, problem.times.host_r))
    return Intervals(t, r, steps, run, evaluations_of(run, solver))


def integrate_limited(problem: Problem, program: Program, intervals: Intervals, limit: int) -> Rollout:
    """Fixed steps with at most ``limit`` samples at once: whenever one ends, the longest one waiting begins."""
    schedule = make_schedule(intervals.length, limit)
    slots = Slots(problem.x, problem.condition, problem.field_dtype, program.memories, limit)
    return integrate_slots(
        slots,
        lambda rows: slots.advance(problem.field, rows),
        problem.x,
        problem.times,
        problem.condition,
        program,
        intervals,
        schedule,
        schedule.live,
    )


def integrate_in_parts(problem: Problem, limit: int, run: Callable[[Problem], Rollout]) -> Rollout:
    """Run at most ``limit`` samples at a time to their ends, the longest intervals first."""
    lengths = (problem.times.host_t - problem.times.host_r).abs()
    order = torch.argsort(lengths, descending=True, stable=True)
    parts = [run(_part(problem, rows)) for rows in order.split(limit)]
    return Rollout(*(torch.cat(part) for part in zip(*parts, strict=True))).restore(order)


def _part(problem: Problem, rows: Tensor) -> Problem:
    """Some rows of a problem."""
    index = rows.to(problem.x.device, non_blocking=True)
    times = Times(*(part.index_select(0, index if part.is_cuda else rows) for part in problem.times))
    return problem._replace(
        condition=select_rows(problem.condition, index), x=problem.x.index_select(0, index), times=times
    )
