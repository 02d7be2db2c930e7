"""Recording work on a device so that it can be repeated without Python: CUDA graphs behind two functions."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import torch

WARM_UPS = 3
"""Runs before a recording: libraries choose their kernels and reserve memory in the first ones, and the last shows
whether the host has to wait for the device, which no recording survives."""


_ONE_AT_A_TIME = threading.Lock()
"""A process may have one capture under way."""


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
        # Torch's own stream for captures is one of the device that was first used for it. On this one nothing else
        # runs, so that what cuBLAS needs for a stream lies in the pool too.
        self._captures = torch.cuda.Stream(device)
        self._stream = torch.cuda.current_stream(device)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder.record`; makes the host wait."""
        with torch.cuda.device(self._device), _ONE_AT_A_TIME:
            stream, aside = torch.cuda.current_stream(), _stream_for_trials(self._device)
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
            # Other threads, such as one that pins batches of data, may allocate and wait meanwhile.
            capture = torch.cuda.graph(graph, self._pool, self._captures, capture_error_mode="thread_local")
            # The outer context: a capture that fails leaves its own stream behind as the current one.
            with torch.cuda.stream(stream), capture:
                work()
        return graph.replay

    def begin(self) -> None:
        """Wait on the device for repetitions that were started on another stream."""
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream:
            stream.wait_stream(self._stream)
            self._stream = stream


@cache
def _stream_for_trials(device: torch.device) -> torch.cuda.Stream:  # pragma: no cover (gpu)
    """One for all: cuBLAS keeps up to 32 MiB for each stream on which it ever ran."""
    return torch.cuda.Stream(device)


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
