"""Embeddings of time and label into the vector that conditions a network."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfd_fast.ops.mlp_program import NotAnMLP, ProgramBuilder, Slot

LOWEST_FREQUENCY = 1.0
HIGHEST_FREQUENCY = 100.0
"""Radians per unit of time. The lowest moves slowly over [0, 1]; the highest tells times 0.01 apart from each other
and bounds the derivative by time, which a rollout with steps of 0.001 to 0.1 has to follow."""
GAP_FREQUENCY = 6.0
GAP_FEATURES = 32
"""Highest frequency, and number, of the features of a second time. They enter the targets of flow maps through their
derivative by time, so they are slower than those of t."""


class TimeFeatures(nn.Module):
    """Fourier features ``[sin(w t), cos(w t)]`` of a time in [0, 1], w geometric (positional encoding, Vaswani 2017).

    Computed in float32 (float64 for float64 times) even inside a bfloat16 module, because bfloat16 cannot tell apart
    times closer than 0.004. The derivative of every feature by time is at most ``highest``.
    """

    angular: Tensor
    phase: Tensor

    def __init__(self, features: int, highest: float = HIGHEST_FREQUENCY) -> None:
        super().__init__()
        self.highest = highest
        if features < 2 or features % 2:
            raise ValueError(f"time_features must be an even number of at least 2, got {features}")
        self.features = features
        self._fill(torch.get_default_device())

    def _fill(self, device: torch.device) -> None:
        half = self.features // 2
        logs = torch.linspace(math.log(LOWEST_FREQUENCY), math.log(self.highest), half, device=device)
        angular = logs.float().exp()
        phase = torch.zeros(self.features, dtype=torch.float32, device=device)
        phase[half:] = math.pi / 2
        self.register_buffer("angular", torch.cat([angular, angular]), persistent=False)
        self.register_buffer("phase", phase, persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "TimeFeatures":
        # module.to(bfloat16) would round the frequencies: follow the device only, and stay in float32.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._fill(self.angular.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        """``t`` ``[B]`` to ``[B, features]`` in float32, or float64 when ``t`` is float64."""
        time = t if t.dtype == torch.float64 else t.float()
        # cos(a) is sin(a + pi / 2): one addcmul and one sin for all features.
        return torch.addcmul(self.phase.to(time.dtype), time[:, None], self.angular.to(time.dtype)).sin()


class LabelEmbedding(nn.Module):
    """A vector for each of ``num_classes`` labels and, in the last row, for the null label (no condition).

    The null row is what classifier-free guidance (Ho and Salimans 2022) calls the unconditional input.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.empty(num_classes + 1, width))
        nn.init.normal_(self.weight, std=0.5)

    def forward(self, label: Tensor | None) -> Tensor:
        """``label`` int64 ``[B]`` to ``[B, width]``; None is the null label, ``[1, width]``.

        A label out of range is a ValueError on the CPU; on CUDA the device reports it.
        """
        if label is None:
            return self.weight[self.num_classes :]
        try:
            return functional.embedding(label, self.weight)
        except IndexError as error:
            valid = f"0..{self.num_classes} ({self.num_classes} = no label)"
            raise ValueError(f"label must be in {valid}, got {label.tolist()}") from error


class ConditionEmbedding(nn.Module):
    """Time and label to one vector ``[B, width]``: ``silu(W2 silu(W1 features(t) + embedding(label)))``.

    `add_second_time` gives it a second time r, as ``W3 slow(t - r)`` inside the inner sum, with W3 zero at first.
    """

    second_time: nn.Linear | None

    def __init__(self, width: int, num_classes: int | None, time_features: int) -> None:
        super().__init__()
        self.time_features = TimeFeatures(time_features)
        self.time_in = nn.Linear(time_features, width)
        self.label = None if num_classes is None else LabelEmbedding(num_classes, width)
        self.out = nn.Linear(width, width)
        self.second_time = None

    def add_second_time(self) -> None:
        """Take a second time from now on; at first it changes nothing."""
        self.gap_features = TimeFeatures(GAP_FEATURES, GAP_FREQUENCY).to(self.out.weight.device)
        layer = nn.Linear(GAP_FEATURES, self.out.in_features)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        self.second_time = layer.to(self.out.weight)

    def forward(self, t: Tensor, label: Tensor | None, dtype: torch.dtype, r: Tensor | None = None) -> Tensor:
        """``t`` ``[B]``, ``label`` int64 ``[B]`` or None, to ``[B, width]``; the module computes in ``dtype``.

        ``r`` ``[B]`` is the second time of a module that has one; None means r = t.
        """
        features: Tensor = self.time_features(t)
        hidden: Tensor = self.time_in(features.to(dtype))
        if self.second_time is not None:
            gap: Tensor = self.gap_features(torch.zeros_like(t) if r is None else t - r)
            hidden = hidden + self.second_time(gap.to(dtype))
        elif r is not None:
            raise ValueError("r was given to a network with one time; network.with_second_time() makes one with two")
        if label is not None:
            self._check_label(label, len(t))
        if self.label is not None:
            hidden = hidden + self.label(label)
        return functional.silu(self.out(functional.silu(hidden)))

    def mlp_program(self, build: ProgramBuilder) -> Slot:
        """`forward` for fused rollouts; the label is the condition ``label``."""
        if self.second_time is not None:
            raise NotAnMLP("the network has a second time")
        features = build.fourier(build.time, self.time_features, "angular", "phase")
        hidden = build.linear(features, self.time_in)
        if self.label is not None:
            hidden = build.add(hidden, build.gather("label", self.label, "weight", self.label.num_classes))
        return build.activation(build.linear(build.activation(hidden, "silu"), self.out), "silu")

    def _check_label(self, label: Tensor, rows: int) -> None:
        if self.label is None:
            raise ValueError("label was given to a model without classes (num_classes is None)")
        if label.dtype not in (torch.int64, torch.int32) or label.dim() != 1 or label.shape[0] not in (1, rows):
            expected = f"int64 of shape [{rows}] or [1]"
            raise ValueError(f"label must be {expected}, got {label.dtype} of shape {list(label.shape)}")
