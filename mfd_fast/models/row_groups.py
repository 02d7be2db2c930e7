"""Several fields of one backbone as contiguous groups of rows of one batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
