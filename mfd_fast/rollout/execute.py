"""From checked arguments to a finished rollout: chooses how the steps are controlled and who executes them."""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import torch
from torch.autograd import forward_ad

from mfd_fast.rollout.adaptive_steps import integrate_adaptive
from mfd_fast.rollout.checks import Times
from mfd_fast.rollout.evaluator import RowEvaluator
from mfd_fast.rollout.fixed_steps import integrate_fixed
from mfd_fast.rollout.library import integrate_with_library
from mfd_fast.rollout.limited import integrate_in_parts, integrate_limited, intervals_of, row_limit
from mfd_fast.rollout.plan import Plan, make_plan
from mfd_fast.rollout.problem import Problem
from mfd_fast.rollout.program import NotLinear, Program, program_of
from mfd_fast.rollout.result import Rollout
from mfd_fast.rollout.table import Intervals
from mfd_fast.solvers import Solver, TorchdiffeqSolver, get_solver
from mfd_fast.step_control import AdaptiveSteps, FixedSteps

RUNNERS = ("auto", "eager", "compiled", "fused", "captured")
GENEROUS_EVALUATIONS = 10_000
"""Evaluations of an adaptive row if the caller sets no limit."""


@dataclass(frozen=True)
class RolloutOptions:
    """How to integrate; the meaning of each option is in `mfd_fast.mean_velocity`."""

    step_size: float | None = None
    steps: int | None = None
    solver: str = "euler"
    rtol: float | None = None
    atol: float | None = None
    max_evaluations: int | None = None
    field_dtype: torch.dtype | None = None
    runner: str = "auto"
    differentiable: bool = False
    max_rows: int | None = None

    def __post_init__(self) -> None:
        solver = get_solver(self.solver)
        adaptive = solver.error_order is not None
        FixedSteps(self.step_size, self.steps)
        if (self.rtol is not None or self.atol is not None) and (not adaptive or self.steps is not None):
            raise ValueError(
                f"rtol and atol need an adaptive solver (bosh3, torchdiffeq:dopri5) without steps=, "
                f"got solver={self.solver!r}, steps={self.steps}"
            )
        if isinstance(solver, TorchdiffeqSolver):
            self._check_library(adaptive)
        for name in ("max_evaluations", "max_rows"):
            _check_count(name, getattr(self, name))
        if self.runner not in RUNNERS:
            close = get_close_matches(str(self.runner), RUNNERS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"runner must be one of {', '.join(RUNNERS)}, got {self.runner!r}{hint}")
        if adaptive and self.steps is None:
            self.adaptive_steps()

    def _check_library(self, adaptive: bool) -> None:
        """What torchdiffeq has no counterpart for is refused, not ignored."""
        for name in ("max_evaluations", "max_rows"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is not available with solver={self.solver!r}")
        if adaptive and self.steps is not None:
            raise ValueError(f"steps needs a method with fixed steps, got solver={self.solver!r}")

    @property
    def fixed_steps(self) -> bool:
        """Whether the number of steps of each row is known beforehand."""
        return self.steps is not None or get_solver(self.solver).error_order is None

    @property
    def with_gradient(self) -> bool:
        """Whether results carry a graph: asked for, and not inside ``torch.no_grad()``."""
        return self.differentiable and torch.is_grad_enabled()

    @cached_property
    def fixed(self) -> FixedSteps:
        """The step control of fixed steps."""
        return FixedSteps(self.step_size, self.steps)

    def adaptive_steps(self) -> AdaptiveSteps:
        """The step control of an adaptive solver; ``step_size`` is its maximum step."""
        control = AdaptiveSteps(max_step=self.step_size)
        given = {name: value for name, value in (("rtol", self.rtol), ("atol", self.atol)) if value is not None}
        return replace(control, **given)


def _check_count(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def pair_options(
    *,
    solver: str = "euler",
    step_size: float | None = None,
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    auxiliary_solver: str | None = None,
    auxiliary_step_size: float | None = None,
    **others: Any,
) -> tuple[RolloutOptions, RolloutOptions]:
    """Options of teacher and auxiliary from those of `mfd_fast.mean_velocity_pair`.

    The auxiliary takes what it has nothing of its own for from the teacher. Tolerances go to the adaptive ones of the
    two solvers; they are refused where neither is.
    """
    other = solver if auxiliary_solver is None else auxiliary_solver
    adaptive = {name: get_solver(name).error_order is not None for name in (solver, other)}

    def options(name: str, size: float | None, count: int | None) -> RolloutOptions:
        takes = adaptive[name] or not any(adaptive.values())
        tolerances = (rtol, atol) if takes else (None, None)
        return RolloutOptions(size, count, name, *tolerances, **others)

    own_size = auxiliary_step_size is not None
    return (
        options(solver, step_size, steps),
        options(other, auxiliary_step_size if own_size else step_size, None if own_size else steps),
    )


def execute(problem: Problem, options: RolloutOptions) -> Rollout:
    """Run the rollout of ``problem``; rows come back in the caller's order."""
    limit = row_limit(options.max_rows, problem.cost, problem.x.shape[0])
    if limit == problem.x.shape[0]:
        return _execute_at_once(problem, options)
    program = None if options.with_gradient or not options.fixed_steps else _program(options)
    if program is None:
        return integrate_in_parts(problem, limit, lambda part: _execute_at_once(part, options))
    with torch.no_grad():
        return integrate_limited(problem, program, plan_intervals(problem, options), limit)


def _program(options: RolloutOptions) -> Program | None:
    """The solver in single evaluations, or None if it cannot be taken apart."""
    solver = get_solver(options.solver)
    assert not isinstance(solver, TorchdiffeqSolver)
    try:
        return program_of(solver)
    except NotLinear:
        return None


def plan_intervals(problem: Problem, options: RolloutOptions) -> Intervals:
    """The rows of ``problem`` as they are integrated with fixed steps."""
    solver = get_solver(options.solver)
    assert not isinstance(solver, TorchdiffeqSolver)
    steps = FixedSteps(options.step_size, options.steps).count(problem.times.host_t, problem.times.host_r)
    return intervals_of(problem, steps, solver, _budget(problem, options))


def _execute_at_once(problem: Problem, options: RolloutOptions) -> Rollout:
    """All rows of ``problem`` together."""
    x, t, r = problem.x, problem.times.t, problem.times.r
    solver = get_solver(options.solver)
    evaluate = RowEvaluator(problem.field, problem.condition, x.shape[0], problem.field_dtype)
    budget = _budget(problem, options)
    with torch.set_grad_enabled(options.with_gradient):
        if isinstance(solver, TorchdiffeqSolver):
            return _with_library(evaluate, problem, solver, options)
        if not options.fixed_steps:
            _check_adaptive(problem.times)
            budget = budget or _generous_budget(problem.times, solver, options)
            return integrate_adaptive(evaluate, x, t, r, solver, options.adaptive_steps(), budget)
        return integrate_fixed(evaluate, x, t, r, _plan(problem.times, solver, options, budget), solver)


def _budget(problem: Problem, options: RolloutOptions) -> int | None:
    """Field evaluations that ``max_evaluations`` network rows a sample allow."""
    budget = None if options.max_evaluations is None else options.max_evaluations // problem.cost
    if budget == 0:
        raise ValueError(
            f"max_evaluations must be at least {problem.cost}, the cost of one guided evaluation, "
            f"got {options.max_evaluations}"
        )
    return budget


def _generous_budget(times: Times, solver: Solver, options: RolloutOptions) -> int:
    """Evaluations that no reachable tolerance needs, so that an unreachable one ends.

    An absurdly small largest step is an error, as for fixed steps.
    """
    if options.step_size is None:
        return GENEROUS_EVALUATIONS
    longest = int(FixedSteps(options.step_size).count(times.host_t, times.host_r).max())
    return max(GENEROUS_EVALUATIONS, 3 * solver.evaluations(longest))


def _check_adaptive(times: Times) -> None:
    """A derivative by times is an error where the steps are chosen from values."""
    for name, time in (("t", times.t), ("r", times.r)):
        tangent = forward_ad.unpack_dual(time).tangent
        if tangent is not None or (torch.is_grad_enabled() and time.requires_grad):
            raise ValueError(f"{name} must be a constant for an adaptive solver; take steps= or a fixed-step solver")


def _plan(times: Times, solver: Solver, options: RolloutOptions, budget: int | None) -> Plan:
    control = FixedSteps(options.step_size, options.steps)
    return make_plan(control.count(times.host_t, times.host_r), solver, budget)


def _with_library(
    evaluate: RowEvaluator, problem: Problem, solver: TorchdiffeqSolver, options: RolloutOptions
) -> Rollout:
    times = problem.times
    control = options.adaptive_steps()
    steps = None
    if solver.error_order is None:
        steps = int(FixedSteps(options.step_size, options.steps).count(times.host_t, times.host_r).max())
    return integrate_with_library(evaluate, problem.x, times.t, times.r, solver, steps=steps, control=control)
