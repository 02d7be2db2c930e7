"""Fixed-step rollouts of which only some rows are computed at once: each slot takes a row to its end, then the next.

Everything an evaluation reads and writes lies in the same memory from the first to the last one, so that evaluations
can be recorded and replayed (`mfd_fast.rollout.captured`). The definition of the result is that of
`mfd_fast.rollout.fixed_steps`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast.guidance import Guided, check_velocity
from mfd_fast.ops.copy_rows import copy_rows
from mfd_fast.ops.guided_step import TIME, SlotState, guided_step
from mfd_fast.rollout.checks import Times
from mfd_fast.rollout.fixed_steps import mean_over
from mfd_fast.rollout.plan import Schedule
from mfd_fast.rollout.program import Program
from mfd_fast.rollout.result import Rollout
from mfd_fast.rollout.table import Intervals, columns, tabulate
from mfd_fast.rows import first_rows, map_tensors, tensors_of
from mfd_fast.types import Condition, Status, VelocityField

TABLE_NUMBERS = 1 << 20
"""Numbers of the table that are made and sent to the device at a time."""


class Slots:
    """Memory for the state, the input and the condition of S rows under way."""

    def __init__(self, x: Tensor, condition: Condition, field_dtype: torch.dtype, memories: int, slots: int) -> None:
        """Slots for rows of ``x`` ``[B, ...]`` with ``condition``; what all rows share takes one row here too."""
        with torch.inference_mode(False):
            state = x.new_zeros(slots, *x.shape[1:])
            self.state = SlotState(
                start=state,
                displacement=torch.zeros_like(state),
                memory=x.new_zeros(memories, *state.shape),
                inputs=torch.zeros_like(state, dtype=field_dtype),
                coefficients=x.new_zeros(columns(memories), slots),
            )
            self.condition = map_tensors(
                condition, lambda value: value.new_zeros(1 if value.shape[0] == 1 else slots, *value.shape[1:])
            )

    @property
    def count(self) -> int:
        """Number of slots."""
        return self.state.start.shape[0]

    def share(self, condition: Condition) -> None:
        """Copy what all rows share."""
        for ours, theirs in zip(tensors_of(self.condition), tensors_of(condition), strict=True):
            if theirs.shape[0] == 1:
                ours.copy_(theirs)

    def fill(self, x: Tensor, t: Tensor, condition: Condition) -> None:
        """Put the first row of ``x`` into every slot, so that a trial run computes something valid."""
        self.share(condition)
        places = torch.arange(self.count, device=x.device)
        self.load(x, condition, torch.zeros_like(places), places)
        self.state.coefficients.zero_()
        self.state.coefficients[TIME].copy_(t[0])

    def load(self, x: Tensor, condition: Condition, rows: Tensor, places: Tensor) -> None:
        """Begin ``rows`` ``[n]`` of ``x`` in the slots ``places`` ``[n]``, int64 on the device."""
        copy_rows(x, rows, self.state.start, places)
        copy_rows(x, rows, self.state.inputs, places)
        self.state.displacement.index_fill_(0, places, 0.0)
        for ours, theirs in zip(tensors_of(self.condition), tensors_of(condition), strict=True):
            if theirs.shape[0] != 1:
                copy_rows(theirs, rows, ours, places)

    def unload(self, displacement: Tensor, rows: Tensor, places: Tensor) -> None:
        """Put what the slots ``places`` ``[n]`` have come to into ``rows`` ``[n]`` of ``displacement``."""
        copy_rows(self.state.displacement, places, displacement, rows)

    def advance(self, field: VelocityField, rows: int) -> None:
        """One evaluation of the first ``rows`` slots and what follows it."""
        x, t = self.state.inputs[:rows], self.state.coefficients[TIME, :rows]
        condition = first_rows(self.condition, rows)
        if isinstance(field, Guided):
            conditional, negative = field.velocities(x, t, condition["condition"], condition["negative_condition"])
            check_velocity(negative, x.shape)
            guidance = condition["guidance_scale"]
        else:
            conditional, negative, guidance = field(x, t, **condition), None, None
        guided_step(self.state, check_velocity(conditional, x.shape), negative, guidance)


class _Arrivals(NamedTuple):
    """Rows in the order in which they begin, ``[B]`` int64 each."""

    rows: Tensor
    places: Tensor
    before: Tensor
    """The row whose slot each of them takes; itself for the first one of a slot."""
    parts: dict[int, slice]
    """Which of them begin with an evaluation."""
    last: Tensor
    """``[S]``: the last row of each slot in use."""


def integrate_slots(
    slots: Slots,
    advance: Callable[[int], None],
    x: Tensor,
    times: Times,
    condition: Condition,
    program: Program,
    intervals: Intervals,
    schedule: Schedule,
    batches: Sequence[int],
) -> Rollout:
    """Integrate all rows of ``x`` ``[B, ...]`` through ``slots``.

    Args:
        slots: the memory, with the condition's structure; at least as many slots as the schedule uses.
        advance: does one evaluation of so many slots, see `Slots.advance`.
        x: the state at t (float32 or float64).
        times: start and end of each row.
        condition: of all rows of ``x``.
        program: the solver.
        intervals: the rows on the host.
        schedule: when each row is computed, and in which slot.
        batches: slots to compute in each evaluation, at least those at work.
    """
    device = x.device
    arrivals = _arrivals(schedule, slots.count)
    rows, places, before, last = (upload(part, device) for part in (*arrivals[:3], arrivals.last))
    displacement = torch.empty_like(x)
    slots.share(condition)
    first, table = 0, torch.empty(0)
    for evaluation, batch in enumerate(batches):
        if (part := arrivals.parts.get(evaluation)) is not None:
            if evaluation:
                slots.unload(displacement, before[part], places[part])
            slots.load(x, condition, rows[part], places[part])
        if evaluation == first + len(table):
            first = evaluation
            table = upload(_table(program, schedule, intervals, first, len(batches), slots), device)
        slots.state.coefficients.copy_(table[evaluation - first])
        advance(batch)
    slots.unload(displacement, last, torch.arange(len(last), device=device))
    return _finish(displacement, times, intervals)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on the CPU as one on ``device``, without making the host wait."""
    if device.type == "cuda":
        values = values.pin_memory()  # pragma: no cover (gpu)
    return values.to(device, non_blocking=True)


def _arrivals(schedule: Schedule, slots: int) -> _Arrivals:
    rows = torch.argsort(schedule.begin, stable=True)
    places, begin = schedule.slot[rows], schedule.begin[rows].tolist()
    current: dict[int, int] = {}
    before = []
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        before.append(current.get(place, row))
        current[place] = row
    parts: dict[int, slice] = {}
    for index, evaluation in enumerate(begin):
        parts[evaluation] = slice(parts[evaluation].start if evaluation in parts else index, index + 1)
    # Slots that no row ever takes may be computed to fill up a batch: they get something valid to compute.
    idle = torch.arange(len(current), slots, device="cpu")
    at_work = parts[0].stop
    rows = torch.cat([rows[:at_work], torch.full_like(idle, int(rows[0])), rows[at_work:]])
    places = torch.cat([places[:at_work], idle, places[at_work:]])
    added = len(idle)
    parts = {e: slice(part.start + added * (e > 0), part.stop + added) for e, part in parts.items()}
    previous = torch.tensor([*before[:at_work], *[0] * added, *before[at_work:]], device="cpu")
    last = torch.tensor([current[place] for place in range(len(current))], device="cpu")
    return _Arrivals(rows, places, previous, parts, last)


def _table(
    program: Program, schedule: Schedule, intervals: Intervals, first: int, evaluations: int, slots: Slots
) -> Tensor:
    """The numbers of some evaluations from ``first`` on; slots that are not at work get a time that is valid."""
    height, count = slots.state.coefficients.shape
    length = min(evaluations - first, max(1, TABLE_NUMBERS // (height * count)))
    table = tabulate(program, schedule, intervals, first, length, count, slots.state.start.dtype)
    live = torch.tensor(schedule.live[first : first + length], device="cpu")
    idle = torch.arange(count, device="cpu")[None, :] >= live[:, None]
    table[:, TIME] = torch.where(idle, table[:, TIME, :1], table[:, TIME])
    return table


def _finish(displacement: Tensor, times: Times, intervals: Intervals) -> Rollout:
    device, dtype = displacement.device, displacement.dtype
    steps, run = (upload(part.to(dtype), device) for part in (intervals.steps, intervals.run))
    mean_velocity = mean_over(displacement, displacement, times.t, times.r, steps, run)
    instant = (run == 0).view(-1, *(1 for _ in displacement.shape[1:]))
    status = torch.where(intervals.run < intervals.steps, int(Status.MAX_EVALUATIONS), int(Status.SUCCESS))
    displacement = displacement.masked_fill(instant, 0.0)
    return Rollout(displacement, mean_velocity, intervals.length, intervals.run, status)
