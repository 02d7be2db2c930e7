"""Shared protocols, aliases and result codes. Imports nothing of this package."""

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

Condition = Mapping[str, Any]
"""Keyword arguments of a velocity field. Tensors have leading dimension B (rows travel with their samples) or 1
(shared by all rows); mappings may nest; anything else is passed on as it is."""


VelocityField = Callable[..., Tensor]
"""A velocity: ``field(x, t, **condition) -> velocity``.

``x``: ``[B, ...]``; ``t``: ``[B]`` float32 (float64 when x is float64); the result has the shape of ``x``.
A field may declare ``time_range = (lo, hi)``; only then are times checked against it. It may have a method
``prepare_conditions`` for work that need not be done in every evaluation (`PreparesConditions`).
"""

ConditionGroup = tuple[VelocityField, Condition]
"""A field and the condition it is going to be evaluated with."""


class Rows(Protocol):
    """Rows that are read when they are asked for: a tensor, or something larger than memory that behaves like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, ...)``."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers."""
        ...

    def __len__(self) -> int:
        """N."""
        ...

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """The rows ``index`` (int64 ``[n]``), ``[n, ...]`` on the CPU."""
        ...


@runtime_checkable
class SharedBackbone(Protocol):
    """A field that is one role of a backbone it shares with other roles.

    Two fields whose ``backbone`` is the same object are evaluated as contiguous groups of one batch:
    ``field.evaluate_groups([(field, x, t, condition), ...]) -> [velocity, ...]``.
    """

    @property
    def backbone(self) -> Any: ...

    def __call__(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor: ...

    def evaluate_groups(self, groups: "list[RowGroup]") -> list[Tensor]: ...


@runtime_checkable
class OnNetwork(Protocol):
    """A field that is no module and calls one, in whose place it can be given a copy (a compiled one)."""

    @property
    def network(self) -> Any: ...

    def with_network(self, network: Any, /) -> VelocityField: ...


@runtime_checkable
class PreparesConditions(Protocol):
    """A field that does what depends on conditions alone once, not in every evaluation (keys and values of a text).

    A rollout calls ``prepare_conditions([(field, condition), ...])`` once before its first evaluation, with all fields
    of one backbone that it is going to evaluate together, and passes on the conditions that come back instead. These
    belong to that rollout and end with it, so they are never stale: weights do not change inside a rollout. Their
    tensors have as many rows as those they were made from (or 1, shared by all rows), under any names that the field
    understands.
    """

    def prepare_conditions(self, groups: "Sequence[ConditionGroup]") -> "list[Condition]": ...


# Asking ``isinstance`` for these protocols takes 10 to 20 microseconds, also inside rollouts, and from Python 3.12 on
# it does not find a backbone that is a submodule.


def shares_backbone(field: Any) -> TypeGuard[SharedBackbone]:
    """Whether a field is a `SharedBackbone`."""
    return hasattr(field, "evaluate_groups") and hasattr(field, "backbone")


def calls_network(field: Any) -> TypeGuard[OnNetwork]:
    """Whether a field is an `OnNetwork`."""
    return hasattr(field, "with_network") and hasattr(field, "network")


def prepares_conditions(field: Any) -> TypeGuard[PreparesConditions]:
    """Whether a field is a `PreparesConditions`."""
    return hasattr(field, "prepare_conditions")


class RowGroup(NamedTuple):
    """Contiguous rows of one batch that belong to one field of a shared backbone."""

    field: SharedBackbone
    x: Tensor
    t: Tensor
    condition: Condition


class Status(IntEnum):
    """How the integration of a row ended."""

    SUCCESS = 0
    MAX_EVALUATIONS = 1
    STEP_SIZE_UNDERFLOW = 2
    NON_FINITE = 3
    RUNNING = 4

    @property
    def message(self) -> str:
        """A sentence for people."""
        return _STATUS_MESSAGES[self]


_STATUS_MESSAGES = {
    Status.SUCCESS: "The end of the interval was reached.",
    Status.MAX_EVALUATIONS: "max_evaluations was used up before the end of the interval; raise it or loosen rtol/atol.",
    Status.STEP_SIZE_UNDERFLOW: "The step size fell below the resolution of time; loosen rtol/atol or use float64.",
    Status.NON_FINITE: "The velocity was not finite.",
    Status.RUNNING: "The integration is under way.",
}


class RolloutStats(NamedTuple):
    """What an integration did, row by row."""

    evaluations: Tensor
    """``[B]`` int64: rows the network computed for this sample; a guided evaluation counts as 2."""
    steps: Tensor
    """``[B]`` int64: accepted steps (0 where r == t)."""
    status: Tensor
    """``[B]`` int64 of `Status`."""
    runner: str
    """The runner that executed the integration."""
    reason: str
    """Why that runner was used."""
    first_bad: tuple[int, float] | None
    """Row and time of the first velocity that was not finite, or None."""
