"""Rollouts executed by another library's solver, for cross-checking."""

import torch
from torch import Tensor

from mfd_fast.path import expand_times
from mfd_fast.rollout.evaluator import RowEvaluator
from mfd_fast.rollout.result import Rollout
from mfd_fast.solvers.torchdiffeq import TorchdiffeqSolver
from mfd_fast.step_control import AdaptiveSteps


def integrate_with_library(
    evaluate: RowEvaluator,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    solver: TorchdiffeqSolver,
    *,
    steps: int | None,
    control: AdaptiveSteps,
) -> Rollout:
    """Integrate the whole batch in lock-step; every row is charged the evaluations of the batch.

    Args:
        evaluate: the field; its conditions are in the caller's order of rows.
        x: ``[B, ...]``, the state at t (float32 or float64).
        t: ``[B]``, start of each row, in the dtype of x.
        r: ``[B]``, end of each row, in the dtype of x.
        solver: the method.
        steps: equal steps of a fixed-step method.
        control: tolerances and largest step of an adaptive method.
    """
    calls = 0

    def counted(state: Tensor, now: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return evaluate(state, now)

    instant = t == r
    velocity = counted(x, t)
    if bool(instant.all()):
        displacement, mean_velocity = torch.zeros_like(x), velocity
    else:
        displacement = solver.solve(
            counted, x, t, r, steps=steps, rtol=control.rtol, atol=control.atol, max_step=control.largest_step
        )
        width = expand_times((r - t).masked_fill(instant, 1.0), x)
        mean_velocity = torch.where(expand_times(instant, x), velocity, displacement / width)
    rows = torch.zeros(x.shape[0], dtype=torch.int64, device="cpu")
    taken = torch.where(instant.cpu(), 0, steps or 0)
    return Rollout(displacement, mean_velocity, rows + calls, taken, rows)
