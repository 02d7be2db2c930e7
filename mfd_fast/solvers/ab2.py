"""Two-step Adams-Bashforth with a Heun first step: order 2, one evaluation a step and one more for the first.

On the straight path it takes the place of second-order multistep samplers such as DPM-Solver++ 2M.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mfd_fast.path import expand_times
from mfd_fast.solvers.base import Step, Velocity


@dataclass(frozen=True)
class AdamsBashforth2:
    """``x += h (3/2 v_n - 1/2 v_{n-1})`` for equal steps inside a row."""

    order: int = 2
    error_order: int | None = None

    def evaluations(self, steps: int) -> int:
        """Evaluations of the field that ``steps`` steps of one interval cost."""
        return steps + 1

    def step(self, velocity: Velocity, x: Tensor, t: Tensor, h: Tensor, first: Tensor, memory: Tensor | None) -> Step:
        """One step; ``memory`` is the previous step's first velocity, None in the first step."""
        width = expand_times(h, x)
        if memory is None:
            end = velocity(x + width * first, t + h)
            return Step(width * (0.5 * (first + end)), None, None, first)
        return Step(width * torch.add(1.5 * first, memory, alpha=-0.5), None, None, first)


AB2 = AdamsBashforth2()
