"""Random streams keyed by what they are for, so that nothing random needs to be remembered.

A draw depends only on (seed, purpose, index). A resumed run, a run on another number of processes and a run that
accumulates gradients therefore see the same numbers as an undisturbed one.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from mfd_fast.intervals import TimeLaw, sample_pairs


def derive_seed(seed: int, purpose: str, index: int) -> int:
    """A 63-bit seed for one stream; different keys give unrelated streams."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(seed: int, purpose: str, index: int = 0) -> Generator:
    """A CPU generator for one stream."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, index))


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Inside, torch's global generators may be seeded and used; afterwards all of them are what they were."""
    # Without this list torch warns on machines with several GPUs.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)
    with torch.random.fork_rng(devices=devices):
        yield


def standard_normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Standard normal numbers, float32 on the CPU whatever torch's defaults are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Share:
    """The rows of a global batch that this process computes now."""

    total: int
    """Rows of the global batch."""
    first: int
    """First row of the share."""
    rows: int
    """Rows of the share."""

    def __post_init__(self) -> None:
        if not (self.first >= 0 and self.rows >= 1 and self.first + self.rows <= self.total):
            raise ValueError(f"share must lie inside the batch, got {self}")


class RowDraws:
    """Random numbers for the rows of a share: the whole batch is drawn, the share is kept.

    Draws come in the order of the calls; all are float32 on the CPU before they move to ``device``.
    """

    def __init__(self, generator: Generator, share: Share, device: torch.device) -> None:
        self._generator = generator
        self._share = share
        self._device = device
        self.t: Tensor | None = None
        """The times ``[rows]`` that were drawn last, on the CPU."""

    @property
    def rows(self) -> int:
        """Rows of the share."""
        return self._share.rows

    def normal(self, sample_shape: tuple[int, ...]) -> Tensor:
        """Standard normal ``[rows, *sample_shape]``."""
        return self._keep(standard_normal((self._share.total, *sample_shape), self._generator))

    def uniform(self) -> Tensor:
        """Uniform on [0, 1), ``[rows]``."""
        values = torch.rand(self._share.total, generator=self._generator, dtype=torch.float32, device="cpu")
        return self._keep(values)

    def integer(self, below: int) -> int:
        """A number from 0 to ``below - 1``, the same for all rows of the batch."""
        return int(torch.randint(below, (1,), generator=self._generator))

    def times(self, law: TimeLaw) -> Tensor:
        """Times of a law, ``[rows]``, on the CPU: what a rollout plans with stays where the plan is made."""
        self.t = self._part(law.sample(self._share.total, self._generator))
        return self.t

    def pairs(self, law: TimeLaw, equal_share: float) -> tuple[Tensor, Tensor]:
        """Pairs ``t >= r`` of a law, ``[rows]`` each, on the CPU."""
        t, r = sample_pairs(law, self._share.total, equal_share=equal_share, generator=self._generator)
        self.t = self._part(t)
        return self.t, self._part(r)

    def _part(self, values: Tensor) -> Tensor:
        return values[self._share.first : self._share.first + self._share.rows]

    def _keep(self, values: Tensor) -> Tensor:
        return self._part(values).to(self._device, non_blocking=True)


class EpochOrder:
    """Indices of a data set in shuffled epochs; position p is always the same index."""

    def __init__(self, size: int, seed: int, purpose: str) -> None:
        self._size, self._seed, self._purpose = size, seed, purpose
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, first: int, count: int) -> Tensor:
        """int64 ``[count]``: the indices at positions ``first`` to ``first + count - 1`` since the start of the run."""
        parts = []
        while count:
            epoch, offset = divmod(first, self._size)
            part = self._shuffled(epoch)[offset : offset + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return torch.cat(parts)

    def _shuffled(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self._size, generator=make_generator(self._seed, self._purpose, epoch))
        return self._order
