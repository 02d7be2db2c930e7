"""Rows of conditions: every tensor of a condition travels with the samples of its batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mfd_fast.types import Condition


def map_tensors(condition: Condition, function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A copy of a nested condition with ``function`` applied to each tensor."""
    return {
        name: function(value)
        if isinstance(value, Tensor)
        else map_tensors(value, function)
        if isinstance(value, Mapping)
        else value
        for name, value in condition.items()
    }


def tensors_of(condition: Condition) -> list[Tensor]:
    """The tensors of a nested condition, in the order of `map_tensors`."""
    found: list[Tensor] = []
    for value in condition.values():
        found += [value] if isinstance(value, Tensor) else tensors_of(value) if isinstance(value, Mapping) else []
    return found


def check_rows(name: str, condition: Condition, rows: int, device: torch.device) -> None:
    """Raise unless each tensor of ``condition`` has leading dimension ``rows`` or 1 and is on ``device``.

    ValueError for a wrong dimension or device; TypeError for what has rows that cannot be followed: a list or tuple of
    tensors, a text for each sample, an array of numpy.
    """
    for key, value in condition.items():
        if isinstance(value, Mapping):
            check_rows(f"{name}[{key!r}]", value, rows, device)
        if isinstance(value, list | tuple) and any(isinstance(part, Tensor) for part in value):
            raise TypeError(
                f"{name}[{key!r}] must hold its tensors in a mapping, whose rows can follow the samples, "
                f"got a {type(value).__name__} of tensors"
            )
        if not isinstance(value, Tensor):
            if rows > 1 and _is_row_each(value, rows):
                raise TypeError(
                    f"{name}[{key!r}] has something for each of {rows} samples and must be a tensor, so that it can "
                    f"follow them (texts: encode them first), got {type(value).__name__}"
                )
            continue
        if value.dim() == 0 or value.shape[0] not in (1, rows):
            raise ValueError(
                f"{name}[{key!r}] must have leading dimension {rows} (one row per sample) or 1 (shared by all rows), "
                f"got shape {tuple(value.shape)}"
            )
        if value.device != device:
            raise ValueError(f"{name}[{key!r}] must be on the device of x ({device}), got {value.device}")


def _is_row_each(value: Any, rows: int) -> bool:
    """Whether a value that is no tensor has texts or an array's rows for that many samples."""
    if isinstance(value, list | tuple):
        return len(value) == rows and all(isinstance(part, str) for part in value)
    shape = getattr(value, "shape", None)
    return isinstance(shape, tuple) and shape[:1] == (rows,)


def select_rows(condition: Condition, index: Tensor) -> dict[str, Any]:
    """The rows ``index`` ``[n]`` of a condition; tensors shared by all rows stay as they are."""
    return map_tensors(condition, lambda value: value if value.shape[0] == 1 else value.index_select(0, index))


def first_rows(condition: Condition, rows: int) -> dict[str, Any]:
    """The first ``rows`` rows of a condition as views; tensors shared by all rows are expanded."""
    return map_tensors(
        condition, lambda value: value.expand(rows, *value.shape[1:]) if value.shape[0] == 1 else value[:rows]
    )


def can_concatenate(conditions: Sequence[Condition]) -> bool:
    """Whether conditions have the same names and agree in everything but their number of rows."""
    head = conditions[0]
    return all(
        head.keys() == other.keys() and all(_alike(head[name], other[name]) for name in head)
        for other in conditions[1:]
    )


def concatenate(conditions: Sequence[Condition]) -> dict[str, Any]:
    """The rows of several conditions (`can_concatenate`) one after the other."""
    return {
        name: torch.cat([condition[name] for condition in conditions])
        if isinstance(value, Tensor)
        else concatenate([condition[name] for condition in conditions])
        if isinstance(value, Mapping)
        else value
        for name, value in conditions[0].items()
    }


def _alike(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape[1:] == second.shape[1:] and first.dtype == second.dtype
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return can_concatenate([first, second])
    if first is second:
        return True
    equal = first == second if type(first) is type(second) else False
    return equal if isinstance(equal, bool) else False  # arrays compare element by element: not alike
