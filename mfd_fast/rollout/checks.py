"""Checks of what a caller hands over. Anything that would make the host wait for a device is left out on devices."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfd_fast.fields import Autocast, TimeRange, time_range_of
from mfd_fast.rows import check_rows
from mfd_fast.types import Condition, shares_backbone


class Times(NamedTuple):
    """Start and end of every row."""

    t: Tensor
    """``[B]`` in the dtype and on the device of the state."""
    r: Tensor
    """``[B]`` in the dtype and on the device of the state."""
    host_t: Tensor
    """``[B]`` float64 on the CPU, from which steps are counted."""
    host_r: Tensor
    """``[B]`` float64 on the CPU."""


def state_dtype(x: Tensor) -> torch.dtype:
    """float64 for a float64 x, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_x(x: Any) -> None:
    """x must be a floating-point tensor ``[B, ...]`` with finite values."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError("x must have a leading batch dimension, got a 0-dimensional tensor")
    if 0 in x.shape[1:]:
        raise ValueError(f"x must have at least one number in each sample, got shape {tuple(x.shape)}")
    if x.device.type == "cpu" and not bool(x.isfinite().all()):
        row = int((~x.isfinite()).reshape(x.shape[0], -1).any(1).nonzero()[0])
        raise ValueError(f"x must be finite, got NaN or infinity in row {row}")


def check_times(t: Any, r: Any, x: Tensor, field: Any) -> Times:
    """t and r as rows; a number, a 0-dimensional tensor or ``[B]`` each, within the field's ``time_range`` if any."""
    time_range = time_range_of(field)
    hosts, devices = [], []
    for name, value in (("t", t), ("r", r)):
        rows = _as_rows(name, value, x)
        host = rows.detach().to("cpu", torch.float64)
        _check_values(name, host, state_dtype(x), time_range)
        hosts.append(host)
        devices.append(rows.to(x.device, state_dtype(x), non_blocking=True))
    # Times that differ by less than the state can tell apart are one time: no step is counted between them.
    start, end = (host.to(state_dtype(x)) for host in hosts)
    return Times(devices[0], devices[1], hosts[0], torch.where(start == end, hosts[0], hosts[1]))


def check_condition(name: str, condition: Any, x: Tensor) -> Condition:
    """A mapping whose tensors have B or 1 rows and sit on the device of x; None is empty."""
    if condition is None:
        return {}
    if not isinstance(condition, Mapping):
        raise TypeError(
            f"{name} must be a mapping of keyword arguments for the field or None, got {type(condition).__name__}"
        )
    check_rows(name, condition, x.shape[0], x.device)
    return condition


def resolve_field_dtype(field: Any, x: Tensor, field_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which the field gets x; a low-precision module under a float32 x is an error with its remedy."""
    if field_dtype is not None:
        if not isinstance(field_dtype, torch.dtype) or not field_dtype.is_floating_point:
            raise TypeError(f"field_dtype must be a floating-point torch dtype, got {field_dtype!r}")
        return field_dtype
    module = field
    while not isinstance(module, nn.Module | Autocast) and hasattr(module, "field"):
        module = module.field
    if shares_backbone(module) and not isinstance(module, Autocast):
        module = getattr(module.backbone, "module", module.backbone)
    weight = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    low = (torch.bfloat16, torch.float16)
    if weight is not None and weight.dtype in low and x.dtype not in low:
        raise TypeError(
            f"x is {_short(x.dtype)} but the field's weights are {_short(weight.dtype)}: pass "
            f"field_dtype={weight.dtype} (the state stays {_short(state_dtype(x))}, only the field's input is cast)"
        )
    return x.dtype


def _as_rows(name: str, value: Any, x: Tensor) -> Tensor:
    rows = x.shape[0]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.full((rows,), float(value), dtype=torch.float64, device="cpu")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    if not (value.is_floating_point() or value.dtype in (torch.int32, torch.int64)):
        raise TypeError(f"{name} must be a real number or tensor, got {value.dtype}")
    if value.device.type != "cpu" and value.device != x.device:
        raise ValueError(f"{name} must be on the CPU or on the device of x ({x.device}), got {value.device}")
    if value.dim() == 0:
        return value.expand(rows)
    if value.shape != (rows,):
        raise ValueError(f"{name} must be a number, a 0-d tensor or have shape ({rows},), got {tuple(value.shape)}")
    return value


def _check_values(name: str, host: Tensor, dtype: torch.dtype, time_range: TimeRange | None) -> None:
    if not bool(host.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {_first(host, ~host.isfinite())}")
    if time_range is None:
        return
    low, high = time_range
    ends = torch.tensor([low, high], dtype=dtype, device="cpu")  # 0.98 as float32 is more than 0.98
    outside = (host.to(dtype) < ends[0]) | (host.to(dtype) > ends[1])
    if bool(outside.any()):
        raise ValueError(f"{name} must lie in the field's time_range [{low:g}, {high:g}], got {_first(host, outside)}")


def _first(values: Tensor, bad: Tensor) -> str:
    row = int(bad.nonzero()[0])
    value = float(values[row])
    return f"{value:g} in row {row}" if math.isfinite(value) else f"{value} in row {row}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
