"""Accept or reject a proposed step of every row and choose the next one: the numerics of adaptive step control.

`advance_reference` is the definition. `advance` runs the same formulas in the C++ core for tensors on the CPU and in a
Triton kernel for tensors on an NVIDIA GPU.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mfd_fast import native
from mfd_fast.ops import launchers
from mfd_fast.types import Status

_LAST_STEP_SHARE = 1 - 1e-6


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


class ControlSettings(Protocol):
    """What the control goes by; see `mfd_fast.step_control.AdaptiveSteps`, which has all of it."""

    @property
    def rtol(self) -> float: ...
    @property
    def atol(self) -> float: ...
    @property
    def largest_step(self) -> float: ...
    @property
    def safety(self) -> float: ...
    @property
    def min_factor(self) -> float: ...
    @property
    def max_factor(self) -> float: ...


def advance(
    control: ControlSettings,
    state: ControlState,
    r: Tensor,
    x: Tensor,
    candidate: Tensor,
    error: Tensor,
    error_order: int,
) -> ControlState:
    """Accept or reject the step ``x -> candidate`` of every row and choose the next one.

    ``r`` ``[n]``; ``x``, ``candidate`` and the ``error`` estimate ``[n, ...]`` in the dtype of ``state.t``.
    ``error_order``: the power of the step size with which the estimate shrinks (3 for bosh3). Rows that are not RUNNING
    stay as they are. The decisions are constants for derivatives. Nothing is read back from a device. See
    `advance_reference` for the formulas. Raises ValueError if sizes disagree.
    """
    _check_sizes(state, r, x, candidate, error, error_order)
    r, x, candidate, error = r.detach(), x.detach(), candidate.detach(), error.detach()
    tensors = (*state[:4], r, x, candidate, error)
    settings: dict[str, float] = {
        "error_order": error_order,
        "rtol": control.rtol,
        "atol": control.atol,
        "max_step": control.largest_step,
        "safety": control.safety,
        "min_factor": control.min_factor,
        "max_factor": control.max_factor,
    }
    fast = _FAST.get(state.t.device.type)
    decision = fast(tensors, settings) if fast and _compiled_code_can_read(tensors) else None
    return decision or advance_reference(control, state, r, x, candidate, error, error_order)


def advance_reference(
    control: ControlSettings,
    state: ControlState,
    r: Tensor,
    x: Tensor,
    candidate: Tensor,
    error: Tensor,
    error_order: int,
) -> ControlState:
    """The definition of `advance`, in torch, without reading anything back from the device.

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
    step = step_towards(size, t, r)
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


def step_towards(size: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Signed steps of ``size`` (float64) from t towards r; exactly ``r - t`` where that would (nearly) be reached."""
    gap = r - t
    reached = size >= gap.abs().double() * _LAST_STEP_SHARE
    return torch.where(reached, gap, (size * gap.sign()).to(gap.dtype))


def _run_core(tensors: tuple[Tensor, ...], settings: dict[str, float]) -> ControlState | None:
    if not all(tensor.is_contiguous() for tensor in tensors) or (core := native.core()) is None:
        return None
    decision = core.advance(*(tensor.numpy() for tensor in tensors), **settings, threads=torch.get_num_threads())
    return ControlState(*(torch.from_numpy(array) for array in decision))


def _run_triton(tensors: tuple[Tensor, ...], settings: dict[str, float]) -> ControlState | None:
    kernels = launchers.load("step_control", tensors[0].device)
    if kernels is None:
        return None
    return ControlState(*kernels.launch_step_control(*(tensor.contiguous() for tensor in tensors), **settings))


_FAST = {"cpu": _run_core, "cuda": _run_triton}
"""By type of device: what decides there; None from it means that it cannot."""


def _compiled_code_can_read(tensors: tuple[Tensor, ...]) -> bool:
    """Whether all of it is plain memory of one device, in one float type (status: int64), and no torch.func wrapper."""
    t, status = tensors[0], tensors[3]
    return (
        t.dtype in (torch.float32, torch.float64)
        and status.dtype == torch.int64
        and all(
            type(tensor) is Tensor
            and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            and tensor.device == t.device
            and (tensor is status or tensor.dtype == t.dtype)
            for tensor in tensors
        )
    )


def _check_sizes(state: ControlState, r: Tensor, x: Tensor, candidate: Tensor, error: Tensor, error_order: int) -> None:
    rows = state.t.shape
    if any(part.shape != rows for part in state):
        raise ValueError(f"state must have one element a row everywhere, got {[tuple(part.shape) for part in state]}")
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
