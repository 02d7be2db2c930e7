"""How CUDA graphs are asked for, without a CUDA device: `torch.cuda` is a stand-in that writes down its calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mfd_fast.rollout import graphs


class Stream:
    """A stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, other: "Stream") -> None: ...


class Cuda:
    """What `graphs` uses of `torch.cuda`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.callers = Stream(torch.device("cuda", 1))
        self.captures: list[dict[str, Any]] = []
        self.waiting = "default"
        names = ("Stream", "device", "stream", "graph", "current_stream", "graph_pool_handle", "CUDAGraph")
        for name in names:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.waiting)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "waiting", mode))
        graphs._stream_for_trials.cache_clear()

    Stream = staticmethod(Stream)
    graph_pool_handle = staticmethod(object)

    class CUDAGraph:
        def replay(self) -> None: ...

    def current_stream(self, device: Any = None) -> Stream:
        return self.now

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        self.captures.append({"pool": pool, "stream": stream, "capture_error_mode": capture_error_mode})
        with self.stream(stream):
            yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    yield Cuda(monkeypatch)
    graphs._stream_for_trials.cache_clear()


def test_captures_have_a_stream_of_their_device_and_leave_other_threads_alone(cuda: Cuda) -> None:
    device = torch.device("cuda", 1)
    ran: list[Stream] = []
    recorders = [graphs.CudaGraphs(device) for _ in range(2)]
    for recorder in (recorders[0], recorders[0], recorders[1]):
        recorder.record(lambda: ran.append(cuda.now))
    assert {how["capture_error_mode"] for how in cuda.captures} == {"thread_local"}
    # One stream and pool for all captures of a recorder, on the recorder's device and not that of another recorder.
    streams, pools = ([how[name] for how in cuda.captures] for name in ("stream", "pool"))
    for found in (streams, pools):
        assert found[0] is found[1] is not found[2]
    assert {stream.device for stream in streams} == {device}
    # Trial runs never touch it, and all share one stream.
    trials = [stream for stream in ran if stream not in streams]
    assert len(trials) == 3 * graphs.WARM_UPS
    assert len(set(trials)) == 1
    assert trials[0].device == device
    assert cuda.callers not in ran
    assert (cuda.now, cuda.waiting) == (cuda.callers, "default")


def test_one_capture_at_a_time(cuda: Cuda) -> None:
    recorder = graphs.CudaGraphs(torch.device("cuda", 1))
    free: list[bool] = []
    recorder.record(lambda: free.append(graphs._ONE_AT_A_TIME.acquire(blocking=False)))
    assert free == [False] * (graphs.WARM_UPS + 1)
    assert not graphs._ONE_AT_A_TIME.locked()
