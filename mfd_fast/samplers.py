"""Few-step samplers from noise to data as lists of numbers, so that training and inference take the very same steps."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

from mfd_fast.intervals import shift_times

TRAINING_TIMES = 1000
"""Noise levels that DPM-Solver++ as diffusers runs it tells apart."""


class SamplerStep(NamedTuple):
    """One step from noise level ``level``: ``x <- keep * x + velocity * v(x, time) + previous * D``.

    ``D`` is the data prediction ``x - level * v`` of the step before.
    """

    level: float
    """Share of noise in x, in [0, 1]."""
    time: float
    """What the network is told."""
    keep: float
    velocity: float
    previous: float
    """0 for steps of first order."""


def euler(steps: int, shift: float) -> list[SamplerStep]:
    """Euler steps over equal, then shifted times: ``FlowMatchEulerDiscreteScheduler(shift=shift)`` of diffusers.

    There the times before the shift have to be named: ``pipe(..., sigmas=[1 - i / steps for i in range(steps)])``.
    """
    grid = [float(t) for t in shift_times(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)]
    return [SamplerStep(now, now, 1.0, -(now - then), 0.0) for now, then in pairwise(grid)]


def dpm_solver(steps: int, shift: float) -> list[SamplerStep]:
    """DPM-Solver++ (2M, midpoint; Lu et al. 2022, arXiv 2211.01095) on the flow path, first and last step of order one.

    As diffusers' ``DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction",
    flow_shift=shift)``, with its habits: it begins a little below pure noise and tells the network whole thousandths.
    """
    # In numpy's order of operations, as there, since thousandths are cut off: a last bit can move a time.
    width = (1 / TRAINING_TIMES - 1) / steps
    even = [1 - (index * width + 1 if index < steps else 1 / TRAINING_TIMES) for index in range(steps + 1)]
    grid = [shift * level / (1 + (shift - 1) * level) for level in even[:0:-1]]
    levels = [*torch.tensor(grid, dtype=torch.float32).tolist(), 0.0]
    times = [math.floor(level * TRAINING_TIMES) / TRAINING_TIMES for level in grid]
    plan = []
    for index, time in enumerate(times):
        now, then = levels[index], levels[index + 1]
        if index in (0, steps - 1):
            plan.append(SamplerStep(now, time, 1.0, -(now - then), 0.0))
            continue
        width = _log_ratio(then) - _log_ratio(now)
        before = _log_ratio(now) - _log_ratio(levels[index - 1])
        weight = (1 - then) * -math.expm1(-width)
        slope = 0.5 * weight * width / before
        data = weight + slope  # of this step's data prediction x - now * v
        plan.append(SamplerStep(now, time, then / now + data, -data * now, -slope))
    return plan


def _log_ratio(level: float) -> float:
    """Logarithm of data over noise at a level."""
    return math.log((1 - level) / level)


SAMPLERS: dict[str, Callable[[int, float], list[SamplerStep]]] = {"euler": euler, "dpm++": dpm_solver}
"""By name: the plan for a number of steps and a time shift."""
