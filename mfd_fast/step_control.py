"""How long the steps of an integration are: equal steps per row, or steps chosen from an error estimate.

`advance_reference` is the definition of the adaptive control; on the CPU the same formulas run in the C++ core.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast import native
from mfd_fast.types import Status

DEFAULT_STEP_SIZE = 0.02
MAX_STEPS = 100_000
"""More steps than this for one row are taken to be a mistake in ``step_size``."""

_LAST_STEP_SHARE = 1 - 1e-6


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


class ControlState(NamedTuple):
    """Where the control of n rows stands; a row is one sample with its own time and step."""

    t: Tensor
    """``[n]`` current time, in the dtype of the state of the integration (float32 or float64)."""
    step: Tensor
    """``[n]`` signed step to try next; exactly ``r - t`` if it is the last one."""
    previous_error: Tensor
    """``[n]`` scaled error of the last accepted step; 1 before the first."""
    status: Tensor
    """``[n]`` int64 of `Status`."""
    accepted: Tensor
    """``[n]`` bool, whether the step just proposed was accepted."""


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
            step=_step_towards(first, t, r),
            previous_error=torch.ones_like(t),
            status=torch.where(t == r, int(Status.SUCCESS), int(Status.RUNNING)),
            accepted=torch.zeros_like(t, dtype=torch.bool),
        )

    def advance(
        self, state: ControlState, r: Tensor, x: Tensor, candidate: Tensor, error: Tensor, error_order: int
    ) -> ControlState:
        """Accept or reject the step ``x -> candidate`` of every row and choose the next one.

        ``r`` ``[n]``; ``x``, ``candidate`` and the ``error`` estimate ``[n, ...]`` in the dtype of ``state.t``.
        ``error_order``: the power of the step size with which the estimate shrinks (3 for bosh3). Rows that are not
        RUNNING stay as they are. See `advance_reference` for the formulas. Raises ValueError if sizes disagree.
        """
        _check_sizes(state, r, x, candidate, error, error_order)
        r, x, candidate, error = r.detach(), x.detach(), candidate.detach(), error.detach()
        core = native.core() if _core_can_take(state, r, x, candidate, error) else None
        if core is None:
            return advance_reference(self, state, r, x, candidate, error, error_order)
        arrays = (tensor.numpy() for tensor in (*state[:4], r, x, candidate, error))
        decision = core.advance(
            *arrays,
            error_order=error_order,
            rtol=self.rtol,
            atol=self.atol,
            max_step=self.largest_step,
            safety=self.safety,
            min_factor=self.min_factor,
            max_factor=self.max_factor,
            threads=torch.get_num_threads(),
        )
        return ControlState(*(torch.from_numpy(array) for array in decision))


def advance_reference(
    control: AdaptiveSteps,
    state: ControlState,
    r: Tensor,
    x: Tensor,
    candidate: Tensor,
    error: Tensor,
    error_order: int,
) -> ControlState:
    """The definition of `AdaptiveSteps.advance`, in torch, without reading anything back from the device.

    With ``e`` the root mean square over a row of ``error / (atol + rtol * max(|x|, |candidate|))`` and p the error
    order: e not finite is NON_FINITE; a step is accepted if e <= 1; the next step is the last one times
    ``safety e^(-0.7/p) previous_error^(0.4/p)`` if it was accepted, else ``safety e^(-1/p)``, within the bounds.
    """
    width = math.prod(x.shape[1:])
    scale = control.atol + control.rtol * torch.maximum(x.abs(), candidate.abs())
    # 0 * candidate: an infinite candidate would make the scale infinite and hide itself.
    ratio = ((error + 0 * candidate) / scale).reshape(len(x), width)
    e = ratio.double().square().mean(dim=1).sqrt()
    running = state.status == Status.RUNNING
    finite = e.isfinite()
    accepted = running & (e <= 1)

    floored = e.clamp(min=1e-10)
    previous = state.previous_error.double() ** (0.4 / error_order)
    grow = (control.safety * floored ** (-0.7 / error_order) * previous).clamp(control.min_factor, control.max_factor)
    shrink = (control.safety * floored ** (-1 / error_order)).clamp(control.min_factor, 1)
    size = (state.step.double().abs() * torch.where(accepted, grow, shrink)).clamp(max=control.largest_step)

    end = torch.where(state.step == r - state.t, r, state.t + state.step)
    t = torch.where(accepted, end, state.t)
    step = _step_towards(size, t, r)
    status = torch.where(t + step == t, int(Status.STEP_SIZE_UNDERFLOW), int(Status.RUNNING))
    status = torch.where(t == r, int(Status.SUCCESS), status)
    status = torch.where(finite, status, int(Status.NON_FINITE))
    return ControlState(
        t=t,
        step=torch.where(running & finite, step, state.step),
        previous_error=torch.where(accepted, e.clamp(min=1e-4).to(t.dtype), state.previous_error),
        status=torch.where(running, status, state.status),
        accepted=accepted,
    )


def _step_towards(size: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Signed steps of ``size`` (float64) from t towards r; exactly ``r - t`` where that would (nearly) be reached."""
    gap = r - t
    reached = size >= gap.abs().double() * _LAST_STEP_SHARE
    return torch.where(reached, gap, (size * gap.sign()).to(gap.dtype))


def _core_can_take(state: ControlState, *tensors: Tensor) -> bool:
    """Whether all of it is contiguous in CPU memory, as float32 or float64."""
    return state.t.dtype in (torch.float32, torch.float64) and all(
        tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (*state, *tensors)
    )


def _check_sizes(state: ControlState, r: Tensor, x: Tensor, candidate: Tensor, error: Tensor, error_order: int) -> None:
    rows = state.t.shape
    if r.shape != rows or x.shape[:1] != rows:
        raise ValueError(f"state, r and x must have the same number of rows, got {rows}, {r.shape} and {x.shape}")
    if candidate.shape != x.shape or error.shape != x.shape:
        raise ValueError(
            f"candidate and error must have the shape {x.shape} of x, got {candidate.shape}, {error.shape}"
        )
    if not state.t.dtype == r.dtype == x.dtype == candidate.dtype == error.dtype:
        raise ValueError(f"t, r, x, candidate and error must have one dtype, got {x.dtype} with times {state.t.dtype}")
    if error_order < 1:
        raise ValueError(f"error_order must be at least 1, got {error_order}")
