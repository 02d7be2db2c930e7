"""Fixed-step rollouts in plain PyTorch: the definition that faster runners are tested against.

A row that is done is never computed again, and nothing is read back from the device inside the loop.
"""

import torch
from torch import Tensor

from mfd_fast.path import expand_times
from mfd_fast.rollout.evaluator import RowEvaluator
from mfd_fast.rollout.plan import Plan, evaluations_of
from mfd_fast.rollout.result import Rollout
from mfd_fast.solvers.base import Solver
from mfd_fast.types import Status


def integrate_fixed(evaluate: RowEvaluator, x: Tensor, t: Tensor, r: Tensor, plan: Plan, solver: Solver) -> Rollout:
    """Integrate all rows with the steps of ``plan``.

    Args:
        evaluate: the field; its conditions are in the caller's order of rows.
        x: ``[B, ...]``, the state at t (float32 or float64).
        t: ``[B]``, start of each row, in the dtype of x.
        r: ``[B]``, end of each row, in the dtype of x.
        plan: steps per row.
        solver: the solver.
    """
    if not plan.in_order:
        order = plan.order.to(x.device, non_blocking=True)
        x, t, r = x.index_select(0, order), t.index_select(0, order), r.index_select(0, order)
        evaluate.select(order)
    planned, run = (steps.to(x.device, x.dtype, non_blocking=True) for steps in (plan.steps, plan.run))
    h = (r - t) / planned.clamp(min=1)
    displacement, velocity = _march(evaluate, x, t, r, h, plan, solver)
    mean_velocity = mean_over(displacement, velocity, t, r, planned, run)
    status = torch.where(plan.run < plan.steps, int(Status.MAX_EVALUATIONS), int(Status.SUCCESS))
    rollout = Rollout(displacement, mean_velocity, evaluations_of(plan.run, solver), plan.run, status)
    return rollout if plan.in_order else rollout.restore(plan.order)


def mean_over(displacement: Tensor, velocity: Tensor, t: Tensor, r: Tensor, planned: Tensor, run: Tensor) -> Tensor:
    """Displacements ``[B, ...]`` over the time that ``run`` of ``planned`` steps covered; velocities without a step.

    All but the first two ``[B]`` in the dtype of the state.
    """
    instant = run == 0
    covered = torch.where(run == planned, r - t, run * ((r - t) / planned.clamp(min=1))).masked_fill(instant, 1.0)
    return torch.where(expand_times(instant, velocity), velocity, displacement / expand_times(covered, velocity))


def _march(
    evaluate: RowEvaluator, x: Tensor, t: Tensor, r: Tensor, h: Tensor, plan: Plan, solver: Solver
) -> tuple[Tensor, Tensor]:
    """Displacement of all rows and velocity at t, in the order of the plan (longest rows first)."""
    low, high = torch.minimum(t, r), torch.maximum(t, r)

    def velocity(state: Tensor, now: Tensor) -> Tensor:
        return evaluate(state, now.clamp(low, high))  # t + h may pass r by a rounding error

    initial = evaluate(x, t)
    start, displacement, memory = x, torch.zeros_like(x), None
    first: Tensor | None = initial
    done = []
    for step, live in enumerate(plan.live):
        if live < x.shape[0]:
            done.append(displacement[live:])
            evaluate.keep_first(live)
            start, x, displacement = start[:live], x[:live], displacement[:live]
            t, h, low, high = t[:live], h[:live], low[:live], high[:live]
            first = None if first is None else first[:live]
            memory = None if memory is None else memory[:live]
        now = torch.add(t, h, alpha=step)
        if first is None:
            first = velocity(x, now)
        increment, first, _, memory = solver.step(velocity, x, now, h, first, memory)
        displacement = displacement + increment
        x = start + displacement
    done.append(displacement)
    return torch.cat(done[::-1]), initial
