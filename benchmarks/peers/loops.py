"""Integrations written out by hand: what a training script does without a library."""

import itertools
import math

import torch
from torch import Tensor

from peers.guided import Field


def steps_of(t: Tensor, r: Tensor, step_size: float) -> Tensor:
    """Equal steps that each row's interval is cut into, int64 ``[B]``."""
    return ((t - r).abs().double() / step_size - 1e-6).ceil().clamp(min=1).long()


def row_by_row(field: Field, x: Tensor, t: Tensor, r: Tensor, label: Tensor, step_size: float) -> Tensor:
    """A Python loop over rows and steps in float32. Times are on the CPU."""
    means = []
    for row, steps in enumerate(steps_of(t, r, step_size).tolist()):
        width = float(r[row] - t[row])
        state = x[row : row + 1]
        for step in range(steps):
            now = torch.full((1,), float(t[row]) + width * step / steps)
            state = state + width / steps * field(state, now, label[row : row + 1])
        means.append((state - x[row : row + 1]) / width)
    return torch.cat(means)


def lock_step(field: Field, x: Tensor, t: Tensor, r: Tensor, label: Tensor, step_size: float) -> Tensor:
    """The whole batch until its widest interval is done; rows that are done already are computed and not moved."""
    planned = steps_of(t, r, step_size)
    width = (r - t) / planned
    shape = (-1, *[1] * (x.dim() - 1))
    state = x
    for step in range(int(planned.max())):
        moves = torch.where(step < planned, width, 0.0)
        now = t + step * width
        state = state + moves.view(shape) * field(state, torch.maximum(now, r), label)
    return (state - x) / (r - t).view(shape)


def released_loop(
    field: Field,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    label: Tensor,
    step_size: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The arithmetic of the released training loop: batch size 1, a new grid of times for every row.

    Times, step widths and the starting state are in ``dtype``, the grid is rounded to thousandths, the network's
    output is cast to float32, which makes the state float32 after the first step. The released script runs in
    bfloat16; ``field`` must take x in ``dtype`` (see `cast_to`).
    """
    means = []
    for row in range(len(x)):
        start, end = t[row].to(dtype).item(), r[row].to(dtype).item()
        steps = max(1, math.ceil(abs(start - end) / step_size - 1e-6))
        grid = (torch.linspace(start, end, steps + 1) * 1000).round().div(1000).to(dtype)
        state = begin = x[row : row + 1].to(dtype)
        for now, after in itertools.pairwise(grid):
            state = state + (after - now) * field(state, now.view(1), label[row : row + 1]).float()
        means.append((state - begin) / (torch.tensor([end], dtype=dtype) - torch.tensor([start], dtype=dtype)))
    return torch.cat(means).float()


def cast_to(field: Field, dtype: torch.dtype) -> Field:
    """``field`` with its states in ``dtype``, which its network computes in."""
    return lambda x, t, label: field(x.to(dtype), t, label)
