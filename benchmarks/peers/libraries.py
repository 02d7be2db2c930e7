"""torchdiffeq and torchode on rows with their own intervals."""

import torch
from torch import Tensor

from peers.guided import Field
from peers.loops import steps_of


def torchdiffeq_same_numbers(field: Field, x: Tensor, t: Tensor, r: Tensor, label: Tensor, step_size: float) -> Tensor:
    """torchdiffeq's Euler, each row with its own step size and number of steps.

    Time is rescaled so that all rows take the steps of the widest; one that is done gets velocity zero. The numbers
    are this package's, at the cost of the whole batch until the slowest row is done.
    """
    from torchdiffeq import odeint

    planned = steps_of(t, r, step_size)
    width, shape = (r - t) / planned, (-1, *[1] * (x.dim() - 1))
    longest = int(planned.max())

    def rescaled(s: Tensor, state: Tensor) -> Tensor:
        step = s.round()
        moves = torch.where(step < planned, width, 0.0).view(shape)
        return moves * field(state, torch.maximum(t + step * width, r), label)

    grid = torch.arange(longest + 1, dtype=torch.float32)
    path = odeint(rescaled, x, grid[[0, -1]], method="euler", options={"step_size": 1.0})
    return (path[-1] - x) / (r - t).view(shape)


def torchdiffeq_lock_step(
    field: Field, x: Tensor, t: Tensor, r: Tensor, label: Tensor, step_size: float, method: str = "euler"
) -> Tensor:
    """torchdiffeq on intervals rescaled to [0, 1], as one would write it: narrow rows take smaller steps than asked."""
    from torchdiffeq import odeint

    longest, shape = int(steps_of(t, r, step_size).max()), (-1, *[1] * (x.dim() - 1))
    width = r - t

    def rescaled(s: Tensor, state: Tensor) -> Tensor:
        return width.view(shape) * field(state, t + s * width, label)

    path = odeint(rescaled, x, torch.tensor([0.0, 1.0]), method=method, options={"step_size": 1 / longest})
    return (path[-1] - x) / width.view(shape)


def torchode_euler(field: Field, x: Tensor, t: Tensor, r: Tensor, label: Tensor, step_size: float) -> Tensor:
    """torchode's Euler: an interval and a step size for every row, but all rows are computed until the last is done.

    Equal steps inside a row, as many as this package takes.
    """
    import torchode

    def flat_field(now: Tensor, state: Tensor) -> Tensor:
        return field(state.view(x.shape), now, label).flatten(1)

    width = r - t
    solver = torchode.AutoDiffAdjoint(torchode.Euler(term=torchode.ODETerm(flat_field)), torchode.FixedStepController())
    problem = torchode.InitialValueProblem(y0=x.flatten(1), t_start=t, t_end=r)
    end = solver.solve(problem, dt0=width / steps_of(t, r, step_size)).ys[:, -1]
    return (end.view(x.shape) - x) / width.view(-1, *[1] * (x.dim() - 1))
