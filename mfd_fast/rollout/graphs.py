"""Recording work on a device so that it can be repeated without Python: CUDA graphs behind two functions."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

WARM_UPS = 3
"""Runs before a recording: libraries choose their kernels and reserve memory in the first ones, and the last shows
whether the host has to wait for the device, which no recording survives."""


class Recorder(Protocol):
    """Records functions that work in place on memory that stays where it is."""

    def __init__(self, device: torch.device) -> None: ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run ``work`` some times and return what repeats it on the same memory."""
        ...

    def begin(self) -> None:
        """Called before each series of repetitions; they follow whatever was repeated before."""
        ...


class CudaGraphs:  # pragma: no cover (gpu)
    """CUDA graphs that share one pool of memory; they must run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.current_stream(device)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder.record`; makes the host wait."""
        with torch.cuda.device(self._device):
            stream, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(stream)
            try:
                with torch.cuda.stream(aside):
                    for _ in range(WARM_UPS - 1):
                        work()
                    with _waiting_forbidden():
                        work()
            finally:
                stream.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # The outer context: a capture that fails leaves its own stream behind as the current one.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=self._pool):
                work()
        return graph.replay

    def begin(self) -> None:
        """Wait on the device for repetitions that were started on another stream."""
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream:
            stream.wait_stream(self._stream)
            self._stream = stream


@contextmanager
def _waiting_forbidden() -> Iterator[None]:  # pragma: no cover (gpu)
    """Inside, RuntimeError where the host would wait for the device.

    In a capture the same would be an error too, but one that leaves stream and generator of the device in its middle.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


RECORDERS: dict[str, type[Recorder]] = {"cuda": CudaGraphs}
"""By type of device."""
