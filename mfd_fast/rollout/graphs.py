"""Recording work on a device so that it can be repeated without Python: CUDA graphs behind two functions."""

from collections.abc import Callable
from typing import Protocol

import torch

WARM_UPS = 2
"""Runs before a recording: libraries choose their kernels and reserve memory in the first ones."""


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
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                work()
        return graph.replay

    def begin(self) -> None:
        """Wait on the device for repetitions that were started on another stream."""
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream:
            stream.wait_stream(self._stream)
            self._stream = stream


RECORDERS: dict[str, type[Recorder]] = {"cuda": CudaGraphs}
"""By type of device."""
