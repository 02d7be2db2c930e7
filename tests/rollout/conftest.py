"""A stand-in for CUDA graphs on the CPU, as strict as they are, for the tests of recorded rollouts.

It writes down every operation of torch with the memory it reads and writes, and repeats them on that very memory:
Python does not run again, tensors that were put in the place of others are not seen, and results land where they
landed before.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from tiny_recorded import Network
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mfd_fast.rollout import captured, graphs
from mfd_fast.rollout.compiled import NotCompilable

Call = tuple[Any, Any, Any, Any]


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        # Detached tensors keep the memory of now when others get new memory (``parameter.data = ...``).
        self.calls.append(tree_map_only(Tensor, Tensor.detach, (function, args, kwargs or {}, result)))
        return result


def _storages(value: Any) -> set[int]:
    found: set[int] = set()
    tree_map_only(Tensor, lambda tensor: found.add(tensor.untyped_storage().data_ptr()), value)
    return found


class Recorder:
    """See `mfd_fast.rollout.graphs.Recorder`."""

    made: ClassVar["list[Recorder]"] = []

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.replays = 0
        self.recorded: list[int] = []
        """Operations of each recording."""
        Recorder.made.append(self)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        recording = _Recording()
        with recording:
            work()
        calls = recording.calls
        self.recorded.append(len(calls))

        def replay() -> None:
            self.replays += 1
            for function, args, kwargs, result in calls:
                if _storages(result) & _storages((args, kwargs)):
                    if function._schema.is_mutable:
                        function(*args, **kwargs)
                    continue  # a view shows what its memory holds
                again = function(*args, **kwargs)
                _copy(result, again)

        return replay

    def begin(self) -> None:
        pass


def _copy(target: Any, source: Any) -> None:
    if isinstance(target, Tensor):
        target.copy_(source)
    elif isinstance(target, list | tuple):
        for one, other in zip(target, source, strict=True):
            _copy(one, other)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recorder]]:
    """Recording works on the CPU, by the stand-in, which cannot see into compiled code."""

    def not_compiled(field: object) -> None:
        raise NotCompilable("compiled code cannot be written down")

    monkeypatch.setitem(graphs.RECORDERS, "cpu", Recorder)
    monkeypatch.setattr(captured, "compiled_field", not_compiled)
    Recorder.made.clear()
    captured.forget_all()
    yield Recorder
    captured.forget_all()


@pytest.fixture
def network() -> Network:
    """See `tiny_recorded.Network`."""
    return Network().eval()
