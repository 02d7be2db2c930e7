"""The auxiliary's samples, generated ahead: between two student updates the student does not change.

All noise is known in advance (`mfd_fast.streams`), so the samples of several auxiliary updates come from one batch.
Which updates share a batch depends on their place in the cycle alone: a resumed run generates the batch that it stopped
in once more, whole, and gets the same bits.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast.rows import concatenate
from mfd_fast.streams import RowDraws, Share, derive_seed
from mfd_fast.types import Condition

Draw = Callable[[int, Share], tuple[RowDraws, Condition]]
"""The random numbers and the condition of a share of the batch of an update."""


class Sampled(NamedTuple):
    """One backward pass of an auxiliary update."""

    draws: RowDraws
    """With the noise of the samples drawn already."""
    condition: Condition
    data: Tensor
    """``[rows, ...]``: samples of the student, constants."""


class SamplesAhead:
    """Hands out the samples of auxiliary updates and generates many at once.

    Args:
        generate: samples from noise ``[B, ...]`` and their condition.
        sample_shape: shape of one sample.
        draw: what belongs to a share of an update.
        shares: this process's parts of every batch, all of the same size.
        updates: the auxiliary updates of the cycle that an update belongs to.
        rows: at most so many samples at once, but no fewer than one share.
        seed: of the global random state while samples are generated, for networks that draw from it.
        device: where the noise lives.
    """

    def __init__(
        self,
        generate: Callable[[Tensor, Condition], Tensor],
        sample_shape: tuple[int, ...],
        draw: Draw,
        shares: Sequence[Share],
        updates: Callable[[int], range],
        *,
        rows: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._generate, self._shape, self._draw = generate, sample_shape, draw
        self._shares, self._updates = shares, updates
        self._at_once = max(1, rows // shares[0].rows)
        self._seed, self._device = seed, device
        self._ready: dict[tuple[int, int], Sampled] = {}

    def take(self, update: int) -> list[Sampled]:
        """The backward passes of auxiliary update number ``update``."""
        keys = [(update, share) for share in range(len(self._shares))]
        for key in keys:
            if key not in self._ready:
                self._fill(key)
        return [self._ready.pop(key) for key in keys]

    def forget(self) -> None:
        """The student has changed."""
        self._ready.clear()

    def _fill(self, key: tuple[int, int]) -> None:
        """Generate the batch that ``key`` (update and number of the share) belongs to."""
        keys = [(update, share) for update in self._updates(key[0]) for share in range(len(self._shares))]
        first = keys.index(key) // self._at_once * self._at_once
        batch = keys[first : first + self._at_once]
        drawn = [self._draw(update, self._shares[share]) for update, share in batch]
        noise = torch.cat([draws.normal(self._shape) for draws, _ in drawn])
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(derive_seed(self._seed, f"samples/{self._shares[0].first}/{batch[0][1]}", batch[0][0]))
            data = self._generate(noise, concatenate([condition for _, condition in drawn]))
        for here, (draws, condition), part in zip(batch, drawn, data.split(self._shares[0].rows), strict=True):
            self._ready[here] = Sampled(draws, condition, part)
