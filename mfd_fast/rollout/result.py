"""What every rollout returns, in the order of the caller's rows."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rollout(NamedTuple):
    """The outcome of an integration."""

    displacement: Tensor
    """``[B, ...]``: x(end) - x(t), where end is r or, for rows that ended early, the time they reached."""
    mean_velocity: Tensor
    """``[B, ...]``: displacement / (end - t); the velocity at t where end == t."""
    calls: Tensor
    """``[B]`` int64 on the CPU: evaluations of the field."""
    steps: Tensor
    """``[B]`` int64 on the CPU: accepted steps."""
    status: Tensor
    """``[B]`` int64 on the CPU: `mfd_fast.types.Status`."""

    def restore(self, order: Tensor) -> "Rollout":
        """The same rollout after its row ``i`` was the caller's row ``order[i]`` (int64 ``[B]`` on the CPU)."""
        back = torch.argsort(order)
        on_device = back.to(self.displacement.device, non_blocking=True)
        return Rollout(
            self.displacement.index_select(0, on_device),
            self.mean_velocity.index_select(0, on_device),
            self.calls[back],
            self.steps[back],
            self.status[back],
        )


class SuccessfulRollout(Rollout):
    """A rollout of which it is known that every row succeeded with finite numbers, so that nobody needs to look."""
