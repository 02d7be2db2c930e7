"""Exponential moving average of a role's weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """``average <- d average + (1 - d) weights`` with ``d = min(decay, (1 + n) / (10 + n))`` after n updates.

    The warm-up keeps the average from being dominated by the start.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._weights = [parameter.detach() for parameter in parameters]
        self._decay = decay
        self._average = [weight.clone() for weight in self._weights]

    def update(self, updates: int, skipped: Tensor | None = None) -> None:
        """Take in the weights after ``updates`` updates; nothing happens where ``skipped`` (a bool on the device) says
        that the last of them changed nothing. An element that is not finite stays out.
        """
        share = 1 - min(self._decay, (1 + updates) / (10 + updates))
        steps = torch._foreach_sub(self._weights, self._average)
        torch._foreach_mul_(steps, share if skipped is None else torch.where(skipped, 0.0, share))
        for step in steps:
            step.nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_add_(self._average, steps)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network has the averaged weights."""
        kept = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._average)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, kept)

    def settle(self) -> None:
        """Give the network the averaged weights for good."""
        torch._foreach_copy_(self._weights, self._average)

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights, named by their position."""
        return {str(index): value for index, value in enumerate(self._average)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` gave."""
        for index, value in enumerate(self._average):
            value.copy_(tensors[str(index)])
