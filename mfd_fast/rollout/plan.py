"""Which rows of a batch step when: rows with the most steps first, so that finished rows fall off the end."""

from bisect import bisect_right
from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast.solvers.base import Solver


class Plan(NamedTuple):
    """Equal steps inside each row, a number of steps per row."""

    order: Tensor
    """``[B]`` int64: rows, longest first."""
    in_order: bool
    """Whether the batch is in that order already."""
    steps: Tensor
    """``[B]`` int64 in that order: steps into which the row's interval is cut (0 where r == t)."""
    run: Tensor
    """``[B]`` int64 in that order: steps that are run, fewer than ``steps`` where the budget ends them."""
    live: list[int]
    """Rows that take part in step 0, 1, ..."""


def make_plan(steps: Tensor, solver: Solver, max_evaluations: int | None) -> Plan:
    """The plan for ``steps`` ``[B]`` int64 on the CPU and at most ``max_evaluations`` field evaluations a row.

    Raises:
        ValueError: the budget is too small for a single step.
    """
    run = steps
    if max_evaluations is not None and steps.numel():
        longest = int(steps.max())
        allowed = bisect_right(range(longest + 1), max_evaluations, key=solver.evaluations) - 1
        if longest and allowed < 1:
            raise ValueError(
                f"max_evaluations must allow one step of the solver, {solver.evaluations(1)} evaluations of the field, "
                f"got room for {max_evaluations}"
            )
        run = steps.clamp(max=allowed)
    order = torch.argsort(run, descending=True, stable=True)
    finishing = torch.bincount(run)
    live = run.numel() - torch.cumsum(finishing, 0)
    in_order = bool((order[1:] > order[:-1]).all())
    return Plan(order, in_order, steps[order], run[order], live[:-1].tolist())
