"""Laws of times t and of pairs (t, r): uniform, logit-normal, shifted, restricted to a range.

All draws are float32 ``[n]`` on the CPU from an explicit generator, whatever precision a run uses: a bfloat16 draw has
only a few hundred distinct values.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor


def _uniform(n: int, generator: Generator | None) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float32, device="cpu")


class TimeLaw(Protocol):
    """A distribution of times in [0, 1]; 0 is data, 1 is noise."""

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """``n`` independent times, float32 ``[n]``."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Times uniform on [0, 1]."""

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """``n`` independent times, float32 ``[n]``."""
        return _uniform(n, generator)


@dataclass(frozen=True)
class LogitNormal:
    """``t = sigmoid(mean + std * normal)`` (Esser et al. 2024, arXiv 2403.03206)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """``n`` independent times, float32 ``[n]``."""
        normal = torch.randn(n, generator=generator, dtype=torch.float32, device="cpu")
        return torch.sigmoid(self.mean + self.std * normal)


@dataclass(frozen=True)
class Shifted:
    """Another law pushed towards noise by `shift_times`."""

    law: TimeLaw
    shift: float

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift must be positive, got {self.shift}")

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """``n`` independent times, float32 ``[n]``."""
        return shift_times(self.law.sample(n, generator), self.shift)


@dataclass(frozen=True)
class Ranged:
    """Another law mapped affinely from [0, 1] onto [low, high]."""

    law: TimeLaw
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low and high must satisfy 0 <= low < high <= 1, got low={self.low}, high={self.high}")

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """``n`` independent times, float32 ``[n]``."""
        return self.low + (self.high - self.low) * self.law.sample(n, generator)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """``S t / (1 + (S - 1) t)``: with S > 1 times move towards noise; 0 and 1 stay (any shape)."""
    return shift * t / (1 + (shift - 1) * t)


LAWS = ("uniform", "logit-normal")


def make_law(
    name: str, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0, low: float = 0.0, high: float = 1.0
) -> TimeLaw:
    """A law by name (`LAWS`), then shifted, then mapped onto [low, high]. mean and std belong to logit-normal."""
    if name not in LAWS:
        raise ValueError(f"law must be one of {', '.join(LAWS)}, got {name!r}")
    law: TimeLaw = Uniform() if name == "uniform" else LogitNormal(mean, std)
    if shift != 1.0:
        law = Shifted(law, shift)
    return law if (low, high) == (0.0, 1.0) else Ranged(law, low, high)


def sample_pairs(
    law: TimeLaw, n: int, *, equal_share: float = 0.0, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Pairs ``t >= r``: two independent draws in order; a share of the rows gets ``r = t``.

    Args:
        law: the law of each draw.
        n: number of pairs.
        equal_share: probability in [0, 1] that a row has ``r == t`` (0 in Mean Flow Distillation, arXiv 2606.11155).
        generator: source of randomness on the CPU.

    Returns:
        ``t`` and ``r``, float32 ``[n]``.
    """
    if not 0 <= equal_share <= 1:
        raise ValueError(f"equal_share must lie in [0, 1], got {equal_share}")
    first, second = law.sample(n, generator), law.sample(n, generator)
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    if equal_share > 0:
        r = torch.where(_uniform(n, generator) < equal_share, t, r)
    return t, r
