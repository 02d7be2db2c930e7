"""Noticing velocities that are not finite, without making the host wait for a device."""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast.rollout.execute import RolloutOptions, execute
from mfd_fast.rollout.problem import Problem
from mfd_fast.rollout.result import Rollout
from mfd_fast.rows import select_rows
from mfd_fast.types import Status


def bad_rows(rollout: Rollout) -> Tensor:
    """``[B]`` bool on the device: rows that met a velocity that is not finite.

    NaN and infinity never leave a sum again; adaptive rollouts notice them before they enter it.
    """
    finite = rollout.mean_velocity.isfinite()
    bad = ~finite.reshape(len(finite), math.prod(finite.shape[1:])).all(1)
    noticed = rollout.status == Status.NON_FINITE
    return bad | noticed.to(bad.device) if bool(noticed.any()) else bad


def mark_bad_rows(rollout: Rollout, bad: Tensor) -> Rollout:
    """The rollout with status NON_FINITE in the rows ``bad`` ``[B]``."""
    return rollout._replace(status=rollout.status.masked_fill(bad.cpu(), int(Status.NON_FINITE)))


def locate(problem: Problem, options: RolloutOptions, row: int) -> float:
    """The time of the first velocity of ``row`` that is not finite, found by integrating that row once more.

    A field that is random may not repeat itself; then the start of the row's interval is returned.
    """
    found = [float(problem.times.host_t[row])]
    seen = False

    def watched(x: Tensor, t: Tensor, /, **condition: object) -> Tensor:
        nonlocal seen
        velocity = problem.field(x, t, **condition)
        if not seen and not bool(velocity.isfinite().all()):
            found[0], seen = float(t[0]), True
        return velocity

    index = torch.tensor([row], device=problem.x.device)
    times = type(problem.times)(*(part[row : row + 1] for part in problem.times))
    single = problem._replace(
        field=watched,
        condition=select_rows(problem.condition, index),
        x=problem.x.index_select(0, index),
        times=times,
    )
    execute(single, options)
    return found[0]


class _Pending(NamedTuple):
    flag: Tensor
    arrived: Callable[[], bool]
    """Whether the flag has been copied to the host."""


_PENDING: deque[_Pending] = deque()
"""Flags of rollouts on CUDA that nobody has looked at yet."""


def defer_check(bad: Tensor) -> None:  # pragma: no cover (gpu)
    """Copy the flag of a CUDA rollout to the host without waiting; `raise_deferred` reads it later."""
    flag = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
    flag.copy_(bad.any(), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(bad.device))  # which need not be the current device
    _PENDING.append(_Pending(flag, copied.query))


def raise_deferred() -> None:
    """Raise FloatingPointError if an earlier CUDA rollout whose flag has arrived by now was not finite."""
    bad = False
    while _PENDING and _PENDING[0].arrived():
        bad = bool(_PENDING.popleft().flag) or bad
    if bad:
        raise FloatingPointError(
            "an earlier rollout met a velocity that was not finite; pass return_stats=True to that call to see where"
        )
