"""Wrappers that give fields of other conventions the convention of `mfd_fast.path` (0 = data, 1 = noise)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfd_fast.path import expand_times

Network = Callable[..., Tensor]


@dataclass(frozen=True)
class reversed_time:  # noqa: N801 - reads as a verb where it is used
    """A field with 0 = noise, 1 = data and velocity data - noise: ``v(x, t) = -field(x, 1 - t)``."""

    field: Network

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The velocity ``[B, ...]`` at ``x`` ``[B, ...]``, ``t`` ``[B]``."""
        return -self.field(x, 1 - t, **condition)


@dataclass(frozen=True)
class scaled_time:  # noqa: N801
    """A field that wants times in [0, scale], e.g. 1000: ``v(x, t) = field(x, scale * t)``."""

    field: Network
    scale: float

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The velocity ``[B, ...]`` at ``x`` ``[B, ...]``, ``t`` ``[B]``."""
        return self.field(x, t * self.scale, **condition)


@dataclass(frozen=True)
class from_data_prediction:  # noqa: N801
    """A network that predicts the data: ``v = (x - network(x, t)) / max(t, min_time)``."""

    field: Network
    min_time: float = 1e-3

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The velocity ``[B, ...]`` at ``x`` ``[B, ...]``, ``t`` ``[B]``; state arithmetic stays in x's dtype."""
        return (x - self.field(x, t, **condition)) / expand_times(t.clamp(min=self.min_time), x)


@dataclass(frozen=True)
class from_noise_prediction:  # noqa: N801
    """A network that predicts the noise: ``v = (network(x, t) - x) / max(1 - t, min_time)``."""

    field: Network
    min_time: float = 1e-3

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The velocity ``[B, ...]`` at ``x`` ``[B, ...]``, ``t`` ``[B]``."""
        return (self.field(x, t, **condition) - x) / expand_times((1 - t).clamp(min=self.min_time), x)


@dataclass(frozen=True)
class autocast:  # noqa: N801
    """A field whose network computes under autocast while states and times stay float32."""

    field: Network
    dtype: torch.dtype

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The velocity ``[B, ...]`` in the dtype the network returns."""
        with torch.autocast(x.device.type, dtype=self.dtype):
            return self.field(x, t, **condition)
