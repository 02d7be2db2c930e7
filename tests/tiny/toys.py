"""Networks of a few weights that contain the truth, and draws that do without sampling error."""

import torch
from torch import Tensor, nn

from mfd_fast.closed_forms import Gaussian
from mfd_fast.intervals import TimeLaw
from mfd_fast.streams import RowDraws, Share, make_generator


class DesignedDraws(RowDraws):
    """Every combination of ``side`` values of z, ``side`` of the path noise e and the given intervals.

    z and e have mean 0 and variance 1 and are uncorrelated exactly, so sums over the rows are expectations of anything
    quadratic in (z, e).
    """

    def __init__(self, t: Tensor, r: Tensor, side: int = 8) -> None:
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


class Affine(nn.Module):
    """A velocity network whose one Euler step from noise is ``a + b z``."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x - (self.a + self.b * x)

    def law(self) -> Gaussian:
        """The exact auxiliary."""
        return Gaussian(self.a.item(), abs(self.b.item()))

    def gradient(self) -> tuple[float, float]:
        """Of a and b, after a backward pass."""
        assert self.a.grad is not None
        assert self.b.grad is not None
        return self.a.grad.item(), self.b.grad.item()


class GaussianMap(nn.Module):
    """The mean velocity of the flow of N(mean, std^2) as a network with two weights; without r it ends at 0 or at t."""

    def __init__(self, mean: float, std: float, end: float | None = None) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())
        self.end = end

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        r = (t if self.end is None else torch.full_like(t, self.end)) if r is None else r
        t, r, variance = t[:, None], r[:, None], (2 * self.log_std).exp()
        sigma_t, sigma_r = ((1 - t) ** 2 * variance + t**2).sqrt(), ((1 - r) ** 2 * variance + r**2).sqrt()
        slope = (t + r - variance * (2 - t - r)) / (sigma_t * (sigma_t + sigma_r))
        return -self.mean + slope * (x - (1 - t) * self.mean)

    def values(self) -> tuple[float, float]:
        """Mean and standard deviation."""
        return self.mean.item(), self.log_std.exp().item()


class DoubleDraws(RowDraws):
    """Random draws in float64."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        super().__init__(make_generator(seed, "test"), Share(rows, 0, rows), torch.device("cpu"))

    def normal(self, sample_shape: tuple[int, ...]) -> Tensor:
        return super().normal(sample_shape).double()

    def uniform(self) -> Tensor:
        return super().uniform().double()

    def times(self, law: TimeLaw) -> Tensor:
        return super().times(law).double()

    def pairs(self, law: TimeLaw, equal_share: float) -> tuple[Tensor, Tensor]:
        t, r = super().pairs(law, equal_share)
        return t.double(), r.double()
