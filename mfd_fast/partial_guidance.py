"""Guidance that saves evaluations: only between two times, or with a negative velocity that is used more than once.

Both change what is integrated. What they cost in accuracy depends on the field: `mfd_fast.recommend` measures it.
Guidance in an interval: Kynkaanniemi et al. 2024 (arXiv 2404.07724).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfd_fast.guidance import PreparesBoth, check_velocity, combine, complete_negative
from mfd_fast.rows import can_concatenate, concatenate, first_rows, select_rows
from mfd_fast.types import Condition, RowGroup, VelocityField, shares_backbone


class NegativeVelocities:
    """What one integration remembers of each row of the caller's batch; on the device."""

    # It changes while the field is evaluated, so a field that holds it is never the same field again.
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, like: Tensor) -> None:
        rows = like.shape[0]
        self.evaluated = torch.zeros(rows, dtype=torch.int64, device=like.device)
        """``[B]``: evaluations of the field under the negative condition."""
        self._guided = torch.zeros_like(self.evaluated)
        self._last = torch.zeros_like(like)

    def due(self, row: Tensor, guided: Tensor, every: int) -> Tensor:
        """``[n]`` bool: which rows ``row`` ``[n]`` need a new velocity, of those that are ``guided`` now."""
        due = guided & (self._guided.index_select(0, row) % every == 0)
        self._guided.index_add_(0, row, guided.long())
        self.evaluated.index_add_(0, row, due.long())
        return due

    def keep(self, row: Tensor, velocity: Tensor) -> None:
        """Remember new velocities of the rows ``row``."""
        self._last = self._last.index_copy(0, row, velocity.to(self._last.dtype))

    def last(self, row: Tensor) -> Tensor:
        """The newest velocities of the rows ``row``."""
        return self._last.index_select(0, row)


@dataclass(frozen=True)
class PartlyGuided(PreparesBoth):
    """`mfd_fast.guidance.Guided` at times in ``interval``; a negative velocity serves ``every`` evaluations of its row.

    Only rows that need a negative velocity are evaluated for it, in the batch of the others where the conditions allow
    it. Which rows those are is read from the device once an evaluation.
    """

    field: VelocityField
    interval: tuple[float, float]
    every: int
    memory: NegativeVelocities

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        *,
        condition: Condition,
        negative_condition: Condition,
        guidance_scale: Tensor,
        row: Tensor,
    ) -> Tensor:
        """The velocity; x ``[n, ...]``, t ``[n]``, guidance_scale ``[n]`` or ``[1]``, row ``[n]`` int64."""
        low, high = self.interval
        guided = (t >= low) & (t <= high)
        due = self.memory.due(row, guided, self.every).nonzero().flatten()
        negative = complete_negative(condition, negative_condition)
        velocity, new = self._evaluate(x, t, condition, negative, due)
        if new is not None:
            self.memory.keep(row.index_select(0, due), new)
        inside = guided.nonzero().flatten()
        if inside.shape[0] == 0:
            return velocity
        scale = guidance_scale.expand(x.shape[0]).index_select(0, inside)
        last = self.memory.last(row.index_select(0, inside))
        combined = combine(velocity.index_select(0, inside), last, scale)
        return velocity.to(combined.dtype).index_copy(0, inside, combined)

    def _evaluate(
        self, x: Tensor, t: Tensor, condition: Condition, negative: Condition, due: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The velocity of all rows, and that of the rows ``due`` under the negative condition."""
        rows = x.shape[0]
        condition, negative = first_rows(condition, rows), first_rows(negative, rows)
        if due.shape[0] == 0:
            return check_velocity(self.field(x, t, **condition), x.shape), None
        some_x, some_t = x.index_select(0, due), t.index_select(0, due)
        some = select_rows(negative, due)
        if shares_backbone(self.field):
            all_rows, some_rows = self.field.evaluate_groups(
                [RowGroup(self.field, x, t, condition), RowGroup(self.field, some_x, some_t, some)]
            )
            return all_rows, some_rows
        if not can_concatenate([condition, some]):
            velocity = check_velocity(self.field(x, t, **condition), x.shape)
            return velocity, check_velocity(self.field(some_x, some_t, **some), some_x.shape)
        together = torch.cat([x, some_x])
        both = self.field(together, torch.cat([t, some_t]), **concatenate([condition, some]))
        check_velocity(both, together.shape)
        return both[:rows], both[rows:]


def check_savings(interval: Any, every: Any) -> tuple[float, float] | None:
    """The interval as two numbers, or None if nothing is saved.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
    """
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"negative_every must be an int, got {type(every).__name__}")
    if every < 1:
        raise ValueError(f"negative_every must be at least 1, got {every}")
    if interval is None:
        return None if every == 1 else (-torch.inf, torch.inf)
    if not isinstance(interval, list | tuple) or not all(isinstance(end, int | float) for end in interval):
        raise TypeError(f"guidance_interval must be two numbers or None, got {interval!r}")
    if len(interval) != 2 or not interval[0] <= interval[1]:
        raise ValueError(f"guidance_interval must be two times in rising order, got {interval!r}")
    return float(interval[0]), float(interval[1])
