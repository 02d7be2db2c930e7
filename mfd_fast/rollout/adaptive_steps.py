"""Adaptive rollouts: every row has its own time, step size and result code.

The number of live rows depends on the error of the rows, so each attempted step reads one small tensor back from the
device; on the CPU this costs nothing.
"""

import torch
from torch import Tensor

from mfd_fast.path import expand_times
from mfd_fast.rollout.evaluator import RowEvaluator
from mfd_fast.rollout.result import Rollout
from mfd_fast.solvers.base import Solver
from mfd_fast.step_control import AdaptiveSteps, ControlState
from mfd_fast.types import Status


class _Live:
    """The rows under way: where they are and what the next step needs."""

    def __init__(self, x: Tensor, t: Tensor, r: Tensor, first: Tensor, control: AdaptiveSteps) -> None:
        rows = x.shape[0]
        self.index = torch.arange(rows, device="cpu")
        self.start, self.x, self.r = x, x, r
        self.begin, self.initial, self.first = t, first, first
        self.displacement = torch.zeros_like(x)
        self.accepted = torch.zeros(rows, dtype=torch.int64, device="cpu")
        self.state = control.start(t, r)

    def select(self, keep: Tensor) -> None:
        """Keep the rows ``keep`` (int64, on the CPU)."""
        on_device = keep.to(self.x.device)
        for name in ("start", "x", "r", "begin", "initial", "first", "displacement"):
            setattr(self, name, getattr(self, name).index_select(0, on_device))
        self.index, self.accepted = self.index[keep], self.accepted[keep]
        self.state = ControlState(*(part.index_select(0, on_device) for part in self.state))

    def result(self, keep: Tensor, status: Tensor, calls: int) -> Rollout:
        """The rows ``keep`` as a finished rollout."""
        on_device = keep.to(self.x.device)
        displacement = self.displacement.index_select(0, on_device)
        covered = (self.state.t - self.begin).index_select(0, on_device)
        mean_velocity = torch.where(
            expand_times(covered == 0, displacement),
            self.initial.index_select(0, on_device),
            displacement / expand_times(covered.masked_fill(covered == 0, 1.0), displacement),
        )
        spent = torch.full((keep.shape[0],), calls, device="cpu")
        return Rollout(displacement, mean_velocity, spent, self.accepted[keep], status[keep])


def integrate_adaptive(
    evaluate: RowEvaluator,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    solver: Solver,
    control: AdaptiveSteps,
    max_evaluations: int,
) -> Rollout:
    """Integrate each row to its tolerance.

    Args:
        evaluate: the field; its conditions are in the caller's order of rows.
        x: ``[B, ...]``, the state at t (float32 or float64).
        t: ``[B]``, start of each row, in the dtype of x.
        r: ``[B]``, end of each row, in the dtype of x.
        solver: a solver with an error estimate.
        control: tolerances and limits of the step size.
        max_evaluations: budget of field evaluations a row.
    """
    live = _Live(x, t, r, evaluate(x, t), control)
    finished: list[Rollout] = []
    order: list[Tensor] = []
    calls, per_step = 1, solver.evaluations(2) - solver.evaluations(1)
    while True:
        status = live.state.status.cpu()
        if calls + per_step > max_evaluations:
            status = status.masked_fill(status == Status.RUNNING, int(Status.MAX_EVALUATIONS))
        running = status == Status.RUNNING
        if not bool(running.all()):
            ended = torch.nonzero(~running).flatten()
            finished.append(live.result(ended, status, calls))
            order.append(live.index[ended])
            keep = torch.nonzero(running).flatten()
            if keep.numel() == 0:
                return _gather(finished).restore(torch.cat(order))
            live.select(keep)
            evaluate.select(keep.to(x.device))
        _attempt(evaluate, live, solver, control)
        calls += per_step


def _attempt(evaluate: RowEvaluator, live: _Live, solver: Solver, control: AdaptiveSteps) -> None:
    """Try one step of every live row and commit it where the controller accepts it."""
    state = live.state
    low, high = torch.minimum(live.begin, live.r), torch.maximum(live.begin, live.r)
    step = solver.step(lambda x, now: evaluate(x, now.clamp(low, high)), live.x, state.t, state.step, live.first, None)
    if step.error is None or step.end_velocity is None or solver.error_order is None:
        raise ValueError("an adaptive solver must return an error estimate and the velocity at the end of its step")
    displacement = live.displacement + step.increment
    candidate = live.start + displacement
    live.state = control.advance(state, live.r, live.x, candidate, step.error, solver.error_order)
    accepted = expand_times(live.state.accepted, candidate)
    live.displacement = torch.where(accepted, displacement, live.displacement)
    live.x = torch.where(accepted, candidate, live.x)
    live.first = torch.where(accepted, step.end_velocity, live.first)
    live.accepted = live.accepted + live.state.accepted.cpu()


def _gather(parts: list[Rollout]) -> Rollout:
    """Several finished groups of rows as one."""
    return Rollout(*(torch.cat(part) for part in zip(*parts, strict=True)))
