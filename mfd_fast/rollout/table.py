"""The numbers of every evaluation of a scheduled rollout, one column for each slot.

Columns of `tabulate`: time of the evaluation, 1 where the slot is at work, which memory keeps the velocity (-1: none),
then the increment's and the offset's coefficients of `mfd_fast.rollout.program.Phase` times the step of the row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast import native
from mfd_fast.rollout.plan import Schedule
from mfd_fast.rollout.program import Program


class Intervals(NamedTuple):
    """The rows of an integration, ``[B]`` each, on the CPU."""

    t: Tensor
    """float64: start, rounded to the dtype of the state."""
    r: Tensor
    """float64: end."""
    steps: Tensor
    """int64: steps into which the interval is cut."""
    run: Tensor
    """int64: steps that are run."""
    length: Tensor
    """int64: evaluations of the field."""


def columns(memories: int) -> int:
    """Numbers for each slot and evaluation."""
    return 3 + 2 * (1 + memories)


def tabulate(
    program: Program,
    schedule: Schedule,
    intervals: Intervals,
    first: int,
    count: int,
    slots: int,
    dtype: torch.dtype,
) -> Tensor:
    """``[count, columns, slots]`` in ``dtype`` (float32 or float64) for the evaluations from ``first`` on."""
    core = native.core()
    if core is None:
        return tabulate_reference(program, schedule, intervals, first, count, slots, dtype)
    phases = (*program.start, *program.cycle)
    table = torch.zeros(count, columns(program.memories), slots, dtype=dtype, device="cpu")
    core.tabulate(
        table.numpy(),
        *(part.contiguous().numpy() for part in (schedule.slot, schedule.begin, intervals.length)),
        *(part.contiguous().numpy() for part in (intervals.t, intervals.r, intervals.steps, intervals.run)),
        [phase.position for phase in phases],
        [phase.store for phase in phases],
        [(*phase.increment, *phase.offset) for phase in phases],
        start=len(program.start),
        first=first,
    )
    return table


def tabulate_reference(
    program: Program,
    schedule: Schedule,
    intervals: Intervals,
    first: int,
    count: int,
    slots: int,
    dtype: torch.dtype,
) -> Tensor:
    """The definition of `tabulate`."""
    table = torch.zeros(count, columns(program.memories), slots, dtype=torch.float64, device="cpu")
    for row, (t, r, steps, run, length) in enumerate(zip(*(part.tolist() for part in intervals), strict=True)):
        h = 0.0 if run == 0 else (r - t) / steps
        begin, slot = int(schedule.begin[row]), int(schedule.slot[row])
        for evaluation in range(max(first, begin), min(first + count, begin + length)):
            phase, position = program.at(evaluation - begin)
            time = min(max(t + position * h, min(t, r)), max(t, r))
            coefficients = [number * h for number in (*phase.increment, *phase.offset)]
            if run == 0:  # a row without steps ends with its velocity in place of a displacement
                coefficients[0] = 1.0
            numbers = torch.tensor([time, 1.0, phase.store, *coefficients], dtype=torch.float64, device="cpu")
            table[evaluation - first, :, slot] = numbers
    return table.to(dtype)
