"""The arithmetic of the released script of Mean Flow Distillation (arXiv 2606.11155), for comparison with ours.

Its times are rounded to thousandths in the weights' type, as are x_t and the widths of the steps; `mean_velocity_pair`
keeps all of it in float32. As launched, accelerate runs the network under autocast and makes its outputs float32: pass
``mfd_fast.fields.autocast(field, torch.bfloat16)``. Slow, row by row, and waits for the device: nothing to train with.
"""

import math

import torch
from torch import Tensor

from mfd_fast.guidance import complete_negative
from mfd_fast.rows import concatenate, select_rows
from mfd_fast.types import Condition, VelocityField

THOUSANDTHS = 1000.0


def released_arithmetic(
    teacher: VelocityField,
    auxiliary: VelocityField,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    condition: Condition,
    negative_condition: Condition,
    guidance_scale: float = 4.5,
    step_size: float = 0.02,
    dtype: torch.dtype = torch.bfloat16,
    keep_outputs: bool = False,
) -> tuple[Tensor, Tensor]:
    """The two mean velocities as the released script computes them.

    Args:
        teacher: guided; one batch of [negative, condition] per step.
        auxiliary: not guided.
        x: ``[B, ...]``, x_t.
        t: ``[B]``, start of each row, not below ``r``.
        r: ``[B]``, end of each row.
        condition: tensors of leading dimension B or 1, as ``negative_condition``.
        step_size: a row takes ``ceil((t - r) / step_size)`` steps.
        dtype: of weights, x_t and times.
        keep_outputs: leave the networks' outputs in their type, as without accelerate.

    Returns:
        ``(u_teacher, u_auxiliary)``, ``[B, ...]`` each.
    """
    t, r = ((time.to(dtype) * THOUSANDTHS).round() / THOUSANDTHS for time in (t, r))
    negative = complete_negative(condition, negative_condition)
    pairs = []
    for row in range(len(x)):
        index = torch.tensor([row], device=x.device)
        own = select_rows(condition, index)
        both = concatenate([select_rows(negative, index), own])

        def plain(y: Tensor, time: Tensor, field: VelocityField = auxiliary, rows: Condition = own) -> Tensor:
            velocity = field(y, time, **rows)
            return velocity if keep_outputs else velocity.float()

        def guided(y: Tensor, time: Tensor, rows: Condition = both, plain: VelocityField = plain) -> Tensor:
            away, towards = plain(torch.cat([y, y]), torch.cat([time, time]), teacher, rows).chunk(2)
            return away + guidance_scale * (towards - away)

        interval = (x[row : row + 1].to(dtype), t[row : row + 1], r[row : row + 1], step_size)
        pairs.append([_mean_velocity(field, *interval) for field in (guided, plain)])
    first, second = (torch.cat(part) for part in zip(*pairs, strict=True))
    return first, second


def _mean_velocity(field: VelocityField, x: Tensor, t: Tensor, r: Tensor, step_size: float) -> Tensor:
    """One row: Euler steps between rounded times, then the difference of the ends over ``t - r``."""
    begin, end = t.item(), r.item()
    if begin == end:
        return field(x, t)
    steps = math.ceil((begin - end) / step_size)
    grid = ((torch.linspace(begin, end, steps + 1) * THOUSANDTHS).round() / THOUSANDTHS).to(x.device, x.dtype)
    y = x
    for now, then in zip(grid[:-1, None], grid[1:, None], strict=True):
        y = y - (now - then) * field(y, now)
    return (x - y) / (t - r)
