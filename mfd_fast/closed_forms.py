"""Laws of data whose velocity is known exactly: teachers without error, and the truth that tests compare with.

All follow the path of `mfd_fast.path` (time 0 = data, 1 = noise). Computations are in the dtype of ``x``, float64
included.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfd_fast.path import data_prediction, expand_times


class Gaussian:
    """Data ``N(mean, std^2)``, independent dimensions.

    With ``sigma_t^2 = (1-t)^2 std^2 + t^2`` and ``kappa(t) = d log sigma_t / dt = (t - (1-t) std^2) / sigma_t^2``::

        velocity(x, t) = -mean + kappa(t) (x - (1-t) mean)

    ``mean`` and ``std`` are numbers, which hold for every dimension, or tensors that broadcast to a sample.
    Raises ValueError for a std that is not positive, values that are not finite or shapes that do not fit together.
    """

    def __init__(self, mean: float | Sequence[float] | Tensor, std: float | Sequence[float] | Tensor) -> None:
        self.mean = _parameter("mean", mean)
        self.std = _positive("std", std)
        try:
            self.sample_shape = tuple((self.mean + self.std).shape) or (1,)
        except RuntimeError as error:
            raise ValueError(
                f"std: expected a shape that broadcasts with mean {list(self.mean.shape)}, got {list(self.std.shape)}"
            ) from error

    def __call__(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        """The velocity at ``x`` ``[B, ...]``, ``t`` ``[B]``. The law has no conditions: they change nothing."""
        mean, _ = self._parameters(x)
        times = expand_times(t.to(x.dtype), x)
        return -mean + self._kappa(x, times) * (x - (1 - times) * mean)

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """``n`` draws ``[n, *shape]``; ``shape`` is that of the parameters unless given (numbers: ``[1]``)."""
        shape = self.sample_shape if shape is None else tuple(shape)
        noise = torch.randn(n, *shape, generator=generator, dtype=dtype, device=_device(generator))
        mean, std = self._parameters(noise)
        return mean + std * noise

    def flow_map(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Where the flow takes ``x`` from time t to r: ``(1-r) mean + (sigma_r/sigma_t) (x - (1-t) mean)``."""
        mean, _ = self._parameters(x)
        start, end = (expand_times(time.to(x.dtype), x) for time in (t, r))
        return (1 - end) * mean + self._sigma(x, end) / self._sigma(x, start) * (x - (1 - start) * mean)

    def mean_velocity(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """``(x - flow_map(x, t, r)) / (t - r)``, written without a difference so that r may equal or approach t.

        ::

            -mean + c (x - (1-t) mean),   c = (t + r - std^2 (2 - t - r)) / (sigma_t (sigma_t + sigma_r))
        """
        mean, std = self._parameters(x)
        start, end = (expand_times(time.to(x.dtype), x) for time in (t, r))
        sigma, sigma_end = self._sigma(x, start), self._sigma(x, end)
        slope = (start + end - std.square() * (2 - start - end)) / (sigma * (sigma + sigma_end))
        return -mean + slope * (x - (1 - start) * mean)

    def euler_mean_velocity(self, x: Tensor, t: Tensor, r: Tensor, steps: int) -> Tensor:
        """What ``steps`` equal Euler steps from t to r find for the mean velocity, exactly.

        ::

            -mean + (1 - prod_i (1 - d kappa(t_i))) / (t - r) (x - (1-t) mean),   d = (t - r) / steps

        The quotient is summed as ``1/steps sum_i kappa(t_i) prod_{j<i} (1 - d kappa(t_j))``, which also holds at r = t.
        """
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        mean, _ = self._parameters(x)
        start, end = (expand_times(time.to(x.dtype), x) for time in (t, r))
        step = (start - end) / steps
        product, total = torch.ones_like(x), torch.zeros_like(x)
        for index in range(steps):
            kappa = self._kappa(x, start - index * step)
            total = total + kappa * product
            product = product * (1 - step * kappa)
        return -mean + total / steps * (x - (1 - start) * mean)

    def data_prediction(self, x: Tensor, t: Tensor) -> Tensor:
        """``E[data | x_t = x] = mean + (1-t) std^2 / sigma_t^2 (x - (1-t) mean)``."""
        mean, std = self._parameters(x)
        times = expand_times(t.to(x.dtype), x)
        gain = (1 - times) * std.square() / self._sigma(x, times).square()
        return mean + gain * (x - (1 - times) * mean)

    def _parameters(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean.to(x), self.std.to(x)

    def _sigma(self, x: Tensor, times: Tensor) -> Tensor:
        return torch.hypot((1 - times) * self.std.to(x), times)

    def _kappa(self, x: Tensor, times: Tensor) -> Tensor:
        return (times - (1 - times) * self.std.to(x).square()) / self._sigma(x, times).square()


class GaussianMixture:
    """Data ``sum_k weights_k N(means_k, stds_k^2 I)`` in d dimensions.

    With ``S_k^2 = (1-t)^2 stds_k^2 + t^2`` and the posterior ``gamma`` of the components given x::

        velocity(x, t) = sum_k gamma_k ( -means_k + (t - (1-t) stds_k^2) / S_k^2 (x - (1-t) means_k) )

    ``weights`` ``[K]`` positive, scaled to sum to one; ``means`` ``[K, d]``; ``stds`` ``[K]`` or one number, positive.
    Raises ValueError for anything else.
    """

    def __init__(
        self,
        weights: Sequence[float] | Tensor,
        means: Sequence[Sequence[float]] | Tensor,
        stds: float | Sequence[float] | Tensor,
    ) -> None:
        self.means = _parameter("means", means)
        if self.means.dim() != 2:
            raise ValueError(f"means: expected shape [K, d], got {list(self.means.shape)}")
        components = len(self.means)
        weights = _positive("weights", weights)
        if weights.shape != (components,):
            raise ValueError(f"weights: expected shape [{components}], got {list(weights.shape)}")
        self.weights = weights / weights.sum()
        stds = _positive("stds", stds)
        if stds.shape not in ((), (components,)):
            raise ValueError(f"stds: expected one number or shape [{components}], got {list(stds.shape)}")
        self.stds = stds.expand(components)
        self.sample_shape = (self.means.shape[1],)

    def __call__(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        """The velocity at ``x`` ``[B, d]``, ``t`` ``[B]``. The law has no conditions: they change nothing."""
        if x.dim() != 2 or x.shape[1:] != self.sample_shape:
            raise ValueError(f"x: expected shape [B, {self.sample_shape[0]}], got {list(x.shape)}")
        means, stds = self.means.to(x), self.stds.to(x)
        times = t.to(x.dtype).view(-1, 1)  # [B, 1]
        variance = ((1 - times) * stds).square() + times.square()  # [B, K]
        centred = x[:, None] - (1 - times)[:, None] * means  # [B, K, d]
        log_posterior = (
            self.weights.to(x).log() - x.shape[1] / 2 * variance.log() - centred.square().sum(2) / (2 * variance)
        )
        kappa = (times - (1 - times) * stds.square()) / variance
        velocities = kappa[:, :, None] * centred - means
        return (log_posterior.softmax(1)[:, :, None] * velocities).sum(1)

    def sample(self, n: int, generator: torch.Generator | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` draws ``[n, d]``."""
        device = _device(generator)
        component = torch.multinomial(self.weights.to(device), n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.sample_shape, generator=generator, dtype=dtype, device=device)
        return self.means.to(noise)[component] + self.stds.to(noise)[component, None] * noise

    def data_prediction(self, x: Tensor, t: Tensor) -> Tensor:
        """``E[data | x_t = x]``."""
        return data_prediction(x, t.to(x.dtype), self(x, t))


def _parameter(argument: str, value: object) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{argument}: expected finite values, got {tensor.tolist()}")
    return tensor


def _positive(argument: str, value: object) -> Tensor:
    tensor = _parameter(argument, value)
    if not bool((tensor > 0).all()):
        raise ValueError(f"{argument}: expected positive values, got {tensor.tolist()}")
    return tensor


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
