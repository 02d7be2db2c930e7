"""Several fields of one backbone as contiguous groups of rows of one batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.types import Condition, RowGroup


class Unmergeable(Exception):
    """The groups cannot be rows of one batch (other keys, dtypes or trailing shapes)."""


def joined_rows(groups: Sequence[RowGroup]) -> tuple[Tensor, Tensor, dict[str, Any]] | None:
    """``x``, ``t`` and condition of all groups as one batch, or None when they differ in keys, dtypes or shapes.

    Raises:
        ValueError: a condition tensor has a leading dimension that is neither 1 nor the rows of its group.
    """
    rows = [len(group.x) for group in groups]
    try:
        x = _joined_tensors("x", [group.x for group in groups], rows)
        t = _joined_tensors("t", [group.t for group in groups], rows)
        return x, t, joined_conditions([group.condition for group in groups], rows)
    except Unmergeable:
        return None


def joined_conditions(conditions: Sequence[Condition], rows: Sequence[int], path: str = "") -> dict[str, Any]:
    """Conditions of groups of ``rows`` rows, concatenated key by key; mappings may nest."""
    first = conditions[0]
    if any(condition.keys() != first.keys() for condition in conditions[1:]):
        raise Unmergeable
    return {key: _joined(f"{path}{key}", [condition[key] for condition in conditions], rows) for key in first}


def _joined(name: str, values: Sequence[Any], rows: Sequence[int]) -> Any:
    if all(isinstance(value, Mapping) for value in values):
        return joined_conditions(values, rows, f"{name}.")
    if all(isinstance(value, Tensor) and value.dim() > 0 for value in values):
        return _joined_tensors(name, values, rows)
    if all(value is values[0] for value in values):
        return values[0]
    if any(not isinstance(value, str | int | float) or value != values[0] for value in values):
        raise Unmergeable
    return values[0]


def _joined_tensors(name: str, tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    first = tensors[0]
    for tensor, count in zip(tensors, rows, strict=True):
        if tensor.shape[0] not in (1, count):
            raise ValueError(f"{name} must have leading dimension {count} or 1, got shape {tuple(tensor.shape)}")
        if tensor.shape[1:] != first.shape[1:] or tensor.dtype != first.dtype or tensor.device != first.device:
            raise Unmergeable
    return torch.cat([tensor.expand(count, *tensor.shape[1:]) for tensor, count in zip(tensors, rows, strict=True)])


class RowSpans:
    """Which contiguous rows of the batch belong to which role; shared by all adapted layers of a backbone."""

    def __init__(self) -> None:
        self.spans: tuple[tuple[str | None, int, int], ...] = ()
        """Role (None = teacher), first row, and the row after the last; neighbours differ in role."""

    def assign(self, groups: Sequence[tuple[str | None, int]]) -> None:
        """Set the spans of groups of (role, rows) that follow each other."""
        spans: list[tuple[str | None, int, int]] = []
        start = 0
        for role, rows in groups:
            spans.append((role, start, start + rows))
            start = start + rows
        self.spans = tuple(spans)

    def clear(self) -> None:
        """No row belongs to a role."""
        self.spans = ()


def merged_groups(
    groups: Sequence[tuple[str | None, int]],
) -> tuple[tuple[str | None, ...], tuple[int, ...]]:
    """The roles of consecutive groups of (role, rows), neighbours of one role as one, and the rows of all but the first
    of them.
    """
    roles: list[str | None] = []
    rows: list[int] = []
    for role, count in groups:
        if roles and roles[-1] == role:
            rows[-1] += count
        elif count:
            roles.append(role)
            rows.append(count)
    return tuple(roles) or (groups[0][0],), tuple(rows[1:])


class GroupedNetwork(nn.Module):
    """A network whose adapted layers are told which rows of the batch belong to which role.

    The rows of the first group are what the others leave of the batch. So a compiled copy sees the size of the batch
    and of the later groups as numbers that may change, and one graph serves any split of any batch.
    """

    def __init__(self, network: nn.Module, rows: RowSpans) -> None:
        super().__init__()
        self.network = network
        self._rows = rows

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Mapping[str, Any],
        roles: tuple[str | None, ...],
        rows: tuple[int, ...] = (),
    ) -> Tensor:
        """The velocity of all rows.

        Args:
            x: ``[N, ...]``.
            t: ``[N]``.
            condition: rows of all groups.
            roles: role of each group, from `merged_groups`.
            rows: rows of each group but the first.
        """
        self._rows.assign(list(zip(roles, (x.shape[0] - sum(rows), *rows), strict=True)))
        try:
            velocity: Tensor = self.network(x, t, **condition)
        finally:
            self._rows.clear()
        return velocity
