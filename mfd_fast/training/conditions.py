"""What a student is conditioned on, and the real samples beside it: a table of rows, drawn in shuffled epochs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mfd_fast.streams import EpochOrder, Share
from mfd_fast.types import Rows


class ConditionTable:
    """Rows of conditions and the negative condition that belongs to them.

    Args:
        rows: conditions with the same number of rows N, on the CPU; empty for an unconditional model.
        negative: what guidance pushes away from, leading dimension 1; None if the model has no such thing.
        seed: of the order.
        samples: real samples ``[N, ...]`` that belong to the rows, for methods that need them.
    """

    def __init__(
        self,
        rows: Mapping[str, Rows],
        negative: Mapping[str, Tensor] | None,
        seed: int,
        samples: Rows | None = None,
    ) -> None:
        sizes = {len(values) for values in rows.values()} | (set() if samples is None else {len(samples)})
        if len(sizes) > 1 or 0 in sizes:
            raise ValueError(
                f"condition tensors, and samples, must have the same number of rows, above 0, got {sorted(sizes)}"
            )
        self._rows = dict(rows)
        self._samples = samples
        self._negative = negative
        self._order = EpochOrder(sizes.pop(), seed, "conditions") if sizes else None

    def draw(self, update: int, share: Share, device: torch.device) -> dict[str, Tensor]:
        """The rows of ``share`` in update number ``update``."""
        if self._order is None:
            return {}
        index = self._order.indices(update * share.total + share.first, share.rows)
        return {name: values[index].to(device, non_blocking=True) for name, values in self._rows.items()}

    def samples(self, update: int, share: Share, device: torch.device) -> Tensor | None:
        """The real samples beside the rows of ``share`` in update number ``update``; None if there are none."""
        if self._order is None or self._samples is None:
            return None
        index = self._order.indices(update * share.total + share.first, share.rows)
        return self._samples[index].to(device, non_blocking=True)

    def negative(self, device: torch.device) -> dict[str, Tensor] | None:
        """The negative condition, shared by all rows."""
        if self._negative is None:
            return None
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self._negative.items()}
