"""The straight path between data and noise, and THE time convention of this package.

Time 0 is data and time 1 is noise::

    x_t      = (1 - t) * data + t * noise
    velocity = d x_t / dt = noise - data        (conditional; its mean given x_t is the marginal velocity)

so sampling goes from t = 1 down to t = 0, one Euler step from t to r < t is ``x_r = x_t - (t - r) * velocity``, and the
mean velocity over an interval is ``u(x, t, r) = (x(r) - x(t)) / (r - t)``.
"""

from torch import Tensor


def expand_times(t: Tensor, x: Tensor) -> Tensor:
    """``t`` ``[B]`` viewed as ``[B, 1, ...]`` so that it broadcasts over the rows of ``x`` ``[B, ...]``."""
    return t.view(-1, *(1 for _ in range(x.dim() - 1)))


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point ``x_t = (1 - t) data + t noise``; data, noise ``[B, ...]``, t ``[B]``; ValueError for other shapes."""
    if not isinstance(t, Tensor) or t.shape not in ((data.shape[0],), (1,)):
        got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"t must be a tensor of shape ({data.shape[0]},), a time for each row, got {got}")
    if noise.shape != data.shape:
        raise ValueError(f"noise must have the shape of data, {tuple(data.shape)}, got {tuple(noise.shape)}")
    weight = expand_times(t, data)
    return (1 - weight) * data + weight * noise


def conditional_velocity(data: Tensor, noise: Tensor) -> Tensor:
    """The velocity ``noise - data`` of the straight path through both points."""
    return noise - data


def data_prediction(x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """``E[data | x_t] = x - t v`` for ``x`` ``[B, ...]`` and ``t`` ``[B]``."""
    return x - expand_times(t, x) * velocity


def noise_prediction(x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """``E[noise | x_t] = x + (1 - t) v`` for ``x`` ``[B, ...]`` and ``t`` ``[B]``."""
    return x + (1 - expand_times(t, x)) * velocity
