"""What a solver is: one step of a batch in which each row has its own time and step size."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""``velocity(x [n, ...], t [n]) -> [n, ...]`` in the dtype of the state."""


class Step(NamedTuple):
    """What one step returns."""

    increment: Tensor
    """``[n, ...]``: x(t + h) - x(t)."""
    end_velocity: Tensor | None
    """``[n, ...]``: the velocity at the end of the step where the solver has evaluated it, else None."""
    error: Tensor | None
    """``[n, ...]``: embedded estimate of the local error, else None."""
    memory: Tensor | None
    """``[n, ...]``: what the next step needs of this one, else None."""


class Solver(Protocol):
    """A method of integration; objects are stateless, shared, and equal where they integrate alike."""

    def __hash__(self) -> int: ...

    @property
    def order(self) -> int:
        """Order of convergence of the global error."""
        ...

    @property
    def error_order(self) -> int | None:
        """Order of the local error estimate, None for a solver without one (fixed steps only)."""
        ...

    def evaluations(self, steps: int) -> int:
        """Evaluations of the field that ``steps`` steps of one interval cost."""
        ...

    def step(self, velocity: Velocity, x: Tensor, t: Tensor, h: Tensor, first: Tensor, memory: Tensor | None) -> Step:
        """One step from ``(x, t)`` by the signed step ``h`` ``[n]``; ``first`` is the velocity at ``(x, t)``."""
        ...
