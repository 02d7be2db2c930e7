"""Memory and work of a network found by running it on tensors without data.

A fake tensor has shape, dtype and storage size but no memory, so a network of any size is run in a second or two. Every
new storage is counted until the last tensor on it is gone: that is what an allocator without waste would hold.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mfd_fast.types import Condition, VelocityField

Inputs = Callable[[int], tuple[Tensor, Tensor, Condition]]
"""``inputs(rows) -> (x, t, condition)``."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside it: ``live`` now, ``peak`` at most so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class Trace(NamedTuple):
    """What rows of a network need besides weights and their gradients, in bytes."""

    saved: int
    """Kept after the forward pass for the backward pass."""
    peak: int
    """Most at any time of forward and backward."""


def trace_training(field: VelocityField, inputs: Inputs, rows: int) -> Trace:
    """A forward and a backward pass through ``rows`` rows; call it inside a `FakeTensorMode`."""
    x, t, condition = inputs(rows)
    x.requires_grad_()
    with LiveBytes() as memory:
        velocity = field(x, t, **condition)
        saved = memory.live
        # With respect to the input only: gradients of weights are states, and are counted there.
        torch.autograd.grad(velocity.float().square().mean(), x)
    return Trace(saved, memory.peak)


def trace_forward(field: VelocityField, inputs: Inputs, rows: int) -> int:
    """Most bytes of a forward pass without gradient; call it inside a `FakeTensorMode`."""
    x, t, condition = inputs(rows)
    with torch.no_grad(), LiveBytes() as memory:
        field(x, t, **condition)
    peak: int = memory.peak  # a context manager of torch has no type
    return peak


def count_operations(field: VelocityField, inputs: Inputs) -> int:
    """Floating-point operations of a forward pass of one row, in products and convolutions."""
    x, t, condition = inputs(1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        field(x, t, **condition)
    operations: int = counter.get_total_flops()
    return operations


def fake() -> FakeTensorMode:
    """The context in which tensors have no data."""
    return FakeTensorMode()
