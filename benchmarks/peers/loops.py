"""Integrations written out by hand: what a training script does without a library."""

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
