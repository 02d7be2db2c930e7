"""Other ways to integrate a batch in which every row has its own interval; they all give the same Euler numbers."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchdiffeq import odeint

Field = Callable[[Tensor, Tensor], Tensor]


def row_by_row(field: Field, x: Tensor, t: Tensor, r: Tensor, step_size: float) -> Tensor:
    """A Python loop over rows and steps, as a training script with batch size 1 does it. Times are on the CPU."""
    means = []
    for row in range(len(x)):
        width = float(r[row] - t[row])
        steps = max(1, int(-(-abs(width) // step_size)))
        state = x[row : row + 1]
        for step in range(steps):
            now = torch.full((1,), float(t[row]) + width * step / steps)
            state = state + width / steps * field(state, now)
        means.append((state - x[row : row + 1]) / width)
    return torch.cat(means)


def lock_step(field: Field, x: Tensor, t: Tensor, r: Tensor, step_size: float) -> Tensor:
    """The whole batch for as many steps as its widest interval needs; narrow rows take smaller steps."""
    steps = max(1, int((t - r).abs().max().div(step_size).ceil()))
    width = (r - t) / steps
    state = x
    for step in range(steps):
        state = state + width[:, None, None, None] * field(state, t + step * width)
    return (state - x) / (r - t)[:, None, None, None]


def torchdiffeq_euler(field: Field, x: Tensor, t: Tensor, r: Tensor, step_size: float) -> Tensor:
    """torchdiffeq's Euler on intervals rescaled to [0, 1], which is its only way to give rows their own interval."""
    steps = max(1, int((t - r).abs().max().div(step_size).ceil()))
    width = r - t
    shape = (-1, 1, 1, 1)

    def rescaled(s: Tensor, state: Tensor) -> Tensor:
        return width.view(shape) * field(state, t + s * width)

    path = odeint(rescaled, x, torch.tensor([0.0, 1.0]), method="euler", options={"step_size": 1 / steps})
    return (path[-1] - x) / width.view(shape)


def torchode_euler(field: Field, x: Tensor, t: Tensor, r: Tensor, step_size: float) -> Tensor:
    """torchode's Euler: an interval and a step size for every row, but all rows are computed until the last is done.

    Equal steps inside a row, as many as this package takes.
    """
    import torchode

    def flat_field(now: Tensor, state: Tensor) -> Tensor:
        return field(state.view(x.shape), now).flatten(1)

    width = r - t
    steps = (width.abs() / step_size - 1e-6).ceil().clamp(min=1)
    term = torchode.ODETerm(flat_field)
    solver = torchode.AutoDiffAdjoint(torchode.Euler(term=term), torchode.FixedStepController())
    problem = torchode.InitialValueProblem(y0=x.flatten(1), t_start=t, t_end=r)
    end = solver.solve(problem, dt0=width / steps).ys[:, -1]
    return (end.view(x.shape) - x) / width.view(-1, 1, 1, 1)
