"""Designed noise: expectations over two normals as finite sums without sampling error."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mfd_fast.intervals import TimeLaw
from mfd_fast.streams import RowDraws, Share, make_generator


class DesignedDraws(RowDraws):
    """Every combination of ``side`` values of z, ``side`` of the path noise e and the given intervals.

    z and e have mean 0 and variance 1 and are uncorrelated exactly, so sums over the rows are expectations of anything
    quadratic in (z, e).
    """

    def __init__(self, t: Tensor, r: Tensor, side: int) -> None:
        rows = len(t) * side * side
        super().__init__(make_generator(0, "unused"), Share(rows, 0, rows), torch.device("cpu"))
        values = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(side) + 0.5) / side).double()
        values = (values / values.square().mean().sqrt()).float()
        sides = torch.arange(side)
        z, e, interval = torch.cartesian_prod(sides, sides, torch.arange(len(t))).unbind(1)
        self._normals = [values[z], values[e]]
        self._t, self._r = t[interval], r[interval]

    def normal(self, sample_shape: tuple[int, ...]) -> Tensor:
        return self._normals.pop(0).view(-1, *(1 for _ in sample_shape)).expand(-1, *sample_shape).contiguous()

    def times(self, law: TimeLaw) -> Tensor:
        return self._t

    def pairs(self, law: TimeLaw, equal_share: float) -> tuple[Tensor, Tensor]:
        return self._t, self._r


@pytest.fixture
def designed_draws() -> Callable[..., RowDraws]:
    """``designed_draws(t, r, side=8)`` for intervals ``t`` ``[n]``, ``r`` ``[n]``."""

    def make(t: Tensor, r: Tensor, side: int = 8) -> RowDraws:
        return DesignedDraws(t, r, side)

    return make
