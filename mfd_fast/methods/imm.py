"""Inductive moment matching (arXiv 2503.07565): the laws of two jumps to the same time are made equal.

Three times s < r < t on one path, ``x_r = (r/t) x_t + (1 - r/t) x0``; ``f(x, t, s) = x - (t-s) u(x, t, s)``

    y = f(x_t, t, s),   y' = stop(f(x_r, r, s)),   loss = weight * MMD^2 of groups of y and y' that share (t, r, s)

by the kernel ``exp(-max(|a - b|, 1e-8) / ((t-s) d))``. Both follow the same law if f is the flow map; it learns the
marginals, not one trajectory, so points need not match. Noise has standard deviation 1 here, so the paper's sigma_data
does not occur. Rows are put in order of their label, so that groups hold few labels.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from mfd_fast.config import BELOW_ONE, COUNT, POSITIVE, one_of
from mfd_fast.methods.base import Actors, Batch, Loss, Method, Needs, OwnOptions, real_samples
from mfd_fast.path import expand_times, interpolate
from mfd_fast.rows import first_rows, select_rows


@dataclass(frozen=True, kw_only=True)
class IMMOptions(OwnOptions):
    """Options of `InductiveMomentMatching`."""

    particles: Annotated[int, "samples of a group", COUNT] = 4
    a: Annotated[int, "power of 1 - t in the weight, 1 or 2", COUNT] = 1
    b: Annotated[float, "offset of the log signal-to-noise ratio in the weight"] = 4.0
    k: Annotated[int, "r is 2^-k of the range of t / (1 - t) below t (paper: 12)", COUNT] = 10
    min_time: Annotated[float, "smallest t", BELOW_ONE] = 0.006
    max_time: Annotated[float, "largest t", POSITIVE] = 0.994
    start: Annotated[str, "weights at the start", one_of("teacher", "random")] = "teacher"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.min_time < self.max_time < 1:
            raise self.error("max_time", f"must lie between min_time and 1; got {self.max_time}")


class InductiveMomentMatching(Method):
    """See the module."""

    summary = "inductive moment matching (arXiv 2503.07565): laws of two jumps by a kernel; data"
    Own = IMMOptions
    own: IMMOptions

    @property
    def needs(self) -> Needs:
        """Data and a second time; whole groups in every backward pass."""
        return Needs(
            teacher=False,
            auxiliary=False,
            data=True,
            second_time=True,
            random_start=self.own.start == "random",
            rows_multiple=self.own.particles,
        )

    def student_loss(self, actors: Actors, batch: Batch) -> Loss:
        """The weighted MMD of the groups."""
        data, condition = self._ordered(real_samples(batch), batch)
        noise = batch.draws.normal(actors.student.sample_shape)
        t, r, s = self._times(batch)
        x_t, x_r = interpolate(data, noise, t), interpolate(data, noise, r)
        field, rows = actors.student.field, first_rows(condition, len(data))
        devices = [data.device] if data.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):  # the same dropout below
            target = x_r - expand_times(r - s, x_r) * field(x_r, r, **rows, r=s).to(x_r.dtype)
        y = x_t - expand_times(t - s, x_t) * field(x_t, t, **rows, r=s).to(x_t.dtype)
        size = self._group_size(len(y))
        first = slice(None, None, size)
        y, target = (jumps.reshape(-1, size, math.prod(jumps.shape[1:])) for jumps in (y, target))
        distances = squared_mmd(y, target, (t - s)[first])
        loss = (self.weight(t[first]) * distances).mean()
        return Loss(loss, {"mmd": distances.detach().mean()})

    def weight(self, t: Tensor) -> Tensor:
        """``1/2 sigmoid(b - l) (-dl/dt) alpha^a / (alpha^2 + t^2)`` with l = 2 log(alpha/t), alpha = 1 - t."""
        alpha = 1 - t
        log_ratio = 2 * (alpha.log() - t.log())
        slope = 2 / (t * alpha)
        decay = alpha**self.own.a / (alpha.square() + t.square())
        return 0.5 * torch.sigmoid(self.own.b - log_ratio) * slope * decay

    def earlier(self, t: Tensor, s: Tensor) -> Tensor:
        """r between ``s`` and ``t`` ``[B]``: a fixed step down in ``t / (1-t)``."""
        low, high = (time / (1 - time) for time in (self.own.min_time, self.own.max_time))
        ratio = t / (1 - t) - (high - low) / 2**self.own.k
        return torch.maximum(ratio.clamp(min=0) / (1 + ratio.clamp(min=0)), s)

    def _times(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        low, high = self.own.min_time, self.own.max_time
        size = self._group_size(batch.draws.rows)
        t = low + (high - low) * batch.draws.uniform()
        first = torch.arange(batch.draws.rows, device=t.device) // size * size
        s = low + (t - low) * batch.draws.uniform()
        t, s = t[first], s[first]
        return t, self.earlier(t, s), s

    def _ordered(self, data: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        label = batch.condition.get("label")
        if label is None or label.shape[0] != len(data):
            return data, dict(batch.condition)
        order = label.argsort(stable=True)
        return data[order], select_rows(batch.condition, order)

    def _group_size(self, rows: int) -> int:
        """``particles``, or fewer for part of a batch, as the search for a sample that is not finite computes it."""
        return math.gcd(rows, self.own.particles)


def squared_mmd(y: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """``mean k(y, y) + mean k(y', y') - 2 mean k(y, y')``, i = j too, of groups ``[G, M, d]``; ``scale`` ``[G]``."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = (a[:, :, None] - b[:, None]).square().sum(3).clamp(min=1e-16)
        return (-squares.sqrt() / (scale.view(-1, 1, 1) * a.shape[2])).exp().mean((1, 2))

    return kernel(y, y) + kernel(target, target) - 2 * kernel(y, target)
