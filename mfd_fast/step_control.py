"""How long the steps of an integration are: equal steps per row, or steps chosen from an error estimate.

The numerics of the adaptive control are in `mfd_fast.ops.step_control`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mfd_fast.ops import step_control
from mfd_fast.ops.step_control import ControlState as ControlState
from mfd_fast.types import Status

DEFAULT_STEP_SIZE = 0.02
MAX_STEPS = 100_000
"""More steps than this for one row are taken to be a mistake in ``step_size``."""


def _require_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")


@dataclass(frozen=True)
class FixedSteps:
    """Equal steps inside each row, of at most ``step_size`` (default 0.02), or ``steps`` of them in every row.

    Raises ValueError if both are given or out of range, TypeError if they are not numbers.
    """

    step_size: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.step_size is not None and self.steps is not None:
            raise ValueError(f"give step_size or steps, not both; got step_size={self.step_size}, steps={self.steps}")
        if self.steps is None:
            step_size = DEFAULT_STEP_SIZE if self.step_size is None else self.step_size
            _require_positive("step_size", step_size)
            object.__setattr__(self, "step_size", step_size)
        elif isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"steps must be an int, got {type(self.steps).__name__}")
        elif not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps must be between 1 and {MAX_STEPS}, got {self.steps}")

    def count(self, t: Tensor, r: Tensor) -> Tensor:
        """Number of steps from ``t`` to ``r``, both ``[B]``: ``[B]`` int64.

        0 where r == t, else ``steps``, or ``max(1, ceil(|t - r| / step_size - 1e-6))`` in float64.
        Raises ValueError if a row would need more than `MAX_STEPS`, or if its times are not finite.
        """
        if self.step_size is None:
            assert self.steps is not None
            return (t != r).long() * self.steps
        needed = (t.double() - r.double()).abs() / self.step_size
        if needed.numel() > 0:
            self._check_limit(needed.max().item())
        return torch.where(t == r, 0, (needed - 1e-6).ceil().clamp(min=1).long())

    def _check_limit(self, most: float) -> None:
        if math.isnan(most):
            raise ValueError("t and r must be finite, got nan")
        if most > MAX_STEPS:
            raise ValueError(
                f"step_size={self.step_size} is too small: the longest interval would need {most:.6g} steps, "
                f"the limit is {MAX_STEPS}"
            )


@dataclass(frozen=True)
class AdaptiveSteps:
    """Steps per row from an error estimate, by a proportional-integral controller.

    ``rtol``, ``atol``: the error allowed per step and element is ``atol + rtol * max(|x|, |candidate|)``.
    ``max_step``, ``first_step``: largest and first step, in units of time. ``safety``, ``min_factor``, ``max_factor``:
    each step is the one before times a factor within these bounds. Raises ValueError or TypeError if out of range.

    Source: Hairer and Wanner, Solving Ordinary Differential Equations II, section IV.2.
    """

    rtol: float = 1e-2
    atol: float = 1e-2
    max_step: float | None = None
    first_step: float = 0.05
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 5.0

    def __post_init__(self) -> None:
        for name in ("atol", "first_step", "safety", "min_factor", "max_factor"):
            _require_positive(name, getattr(self, name))
        if self.rtol != 0:
            _require_positive("rtol", self.rtol)
        if self.max_step is not None:
            _require_positive("max_step", self.max_step)
        for name in ("safety", "min_factor"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be less than 1, got {getattr(self, name)}")
        if self.max_factor <= 1:
            raise ValueError(f"max_factor must be greater than 1, got {self.max_factor}")

    @property
    def largest_step(self) -> float:
        """``max_step``, or infinity."""
        return math.inf if self.max_step is None else self.max_step

    def start(self, t: Tensor, r: Tensor) -> ControlState:
        """The state before the first step from ``t`` to ``r``, both ``[n]`` in the dtype of the integration."""
        t, r = t.detach(), r.detach()
        first = torch.full_like(t, min(self.first_step, self.largest_step), dtype=torch.float64)
        return ControlState(
            t=t,
            step=step_control.step_towards(first, t, r),
            previous_error=torch.ones_like(t),
            status=torch.where(t == r, int(Status.SUCCESS), int(Status.RUNNING)),
            accepted=torch.zeros_like(t, dtype=torch.bool),
        )

    def advance(
        self, state: ControlState, r: Tensor, x: Tensor, candidate: Tensor, error: Tensor, error_order: int
    ) -> ControlState:
        """Accept or reject the step ``x -> candidate`` of every row and choose the next one.

        Shapes, formulas and errors are those of `mfd_fast.ops.step_control.advance`.
        """
        return step_control.advance(self, state, r, x, candidate, error, error_order)
