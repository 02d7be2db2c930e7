"""Which rows of a batch are computed when: rows with the most steps first, so that finished rows fall off the end.

`Plan` is in solver steps, for batches whose rows all begin together. `Schedule` is in single evaluations of the field,
for batches of which only some rows are computed at once: a row that ends makes room for the longest one still waiting.
"""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast import native
from mfd_fast.solvers.base import Solver

LARGEST_POWER = 16
"""Batches are padded to powers of two up to this size, above it to multiples of half of it."""


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


class Schedule(NamedTuple):
    """Rows in slots. A slot computes its rows one after the other and keeps each to its end."""

    order: Tensor
    """``[B]`` int64: rows, longest first."""
    slot: Tensor
    """``[B]`` int64: the slot of each row. Slots that work longest come first, so that nothing ever moves."""
    begin: Tensor
    """``[B]`` int64: the evaluation with which each row begins."""
    live: list[int]
    """Slots at work in evaluation 0, 1, ...: the first so many; never more than before."""


def make_plan(steps: Tensor, solver: Solver, max_evaluations: int | None) -> Plan:
    """The plan for ``steps`` ``[B]`` int64 on the CPU and at most ``max_evaluations`` field evaluations a row.

    Raises:
        ValueError: the budget is too small for a single step.
    """
    run = steps_within(steps, solver, max_evaluations)
    order, _, _, live = make_schedule(run, max(1, len(run)))
    in_order = bool((order[1:] > order[:-1]).all())
    return Plan(order, in_order, steps[order], run[order], live)


def steps_within(steps: Tensor, solver: Solver, max_evaluations: int | None) -> Tensor:
    """``steps`` ``[B]`` int64, cut to what ``max_evaluations`` field evaluations a row allow.

    Raises:
        ValueError: they do not allow a single step.
    """
    if max_evaluations is None or not steps.numel():
        return steps
    longest = int(steps.max())
    allowed = bisect_right(range(longest + 1), max_evaluations, key=solver.evaluations) - 1
    if longest and allowed < 1:
        raise ValueError(
            f"max_evaluations must allow one step of the solver, {solver.evaluations(1)} evaluations of the field, "
            f"got room for {max_evaluations}"
        )
    return steps.clamp(max=allowed)


def evaluations_of(run: Tensor, solver: Solver) -> Tensor:
    """Evaluations of the field that ``run`` ``[B]`` steps cost; one where there is no step."""
    longest = int(run.max()) if run.numel() else 0
    return torch.tensor([max(1, solver.evaluations(steps)) for steps in range(longest + 1)], device="cpu")[run]


def make_schedule(lengths: Tensor, slots: int) -> Schedule:
    """The schedule of rows of ``lengths`` ``[B]`` (int64, on the CPU, evaluations) with ``slots`` computed at once.

    The longest waiting row goes to the slot that is free first (longest processing time first, Graham 1969).
    """
    core = native.core()
    if core is None or torch._C._functorch.is_functorch_wrapped_tensor(lengths):  # which has no memory to read
        return schedule_reference(lengths, slots)
    order, slot, begin, live = (torch.from_numpy(part) for part in core.schedule(lengths.contiguous().numpy(), slots))
    return Schedule(order, slot, begin, live.tolist())


def schedule_reference(lengths: Tensor, slots: int) -> Schedule:
    """The definition of `make_schedule`."""
    rows, needed = len(lengths), lengths.tolist()
    order = sorted(range(rows), key=lambda row: -needed[row])
    free = [(0, place) for place in range(min(slots, rows))]
    slot, begin = [0] * rows, [0] * rows
    for row in order:
        begin[row], slot[row] = heapq.heappop(free)
        heapq.heappush(free, (begin[row] + needed[row], slot[row]))
    by_end = sorted(free, key=lambda pair: (-pair[0], pair[1]))
    name = {place: rank for rank, (_, place) in enumerate(by_end)}
    live = [sum(end > evaluation for end, _ in free) for evaluation in range(by_end[0][0] if by_end else 0)]
    named = [name[place] for place in slot]
    rows_of = (torch.tensor(part, dtype=torch.int64, device="cpu") for part in (order, named, begin))
    order_tensor, slot_tensor, begin_tensor = rows_of
    return Schedule(order_tensor, slot_tensor, begin_tensor, live)


def bucket(rows: int, limit: int) -> int:
    """The batch size to which ``rows`` are padded where a batch size costs a recording: 1, 2, 4, 8, 16, 24, 32, ...

    At most ``limit``, which must be at least ``rows``.
    """
    if rows <= LARGEST_POWER:
        return min(1 << (rows - 1).bit_length(), limit)
    step = LARGEST_POWER // 2
    return min(-(-rows // step) * step, limit)


def buckets(live: Sequence[int], limit: int) -> list[int]:
    """`bucket` of each number."""
    return [bucket(rows, limit) for rows in live]
