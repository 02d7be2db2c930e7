"""A CUDA device that is not there: tensors that say they lie on it and keep their numbers on the CPU.

Inside of `ImaginedCuda` everything that a GPU refuses is an error too: operations on tensors of both devices, `.numpy()`,
reads by the host while a graph is captured. Reads outside of captures are noted. Nothing is said about speed or order.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA = torch.device("cuda:0")
aten = torch.ops.aten

READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_consecutive"}
COPIES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
NO_SCALARS = {"cat", "stack", "index_copy", "index_copy_", "index_select", "gather", "embedding", "index_add_"}
"""Operations that take no tensor without dimensions from the CPU either."""


class ImaginedTensor(Tensor):
    """A tensor on the imagined device, around one on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "ImaginedTensor":
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=CUDA
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replaced = METHODS.get(function)
        if replaced is not None:
            return replaced(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(function, args, kwargs or {})

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Imagined({self.inner!r})"


def _no_numpy(tensor: Tensor, *_: Any, **__: Any) -> Any:
    raise TypeError("can't convert cuda:0 device type tensor to numpy")


def _pin_memory(tensor: Tensor, *_: Any) -> Any:
    raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")


def _tolist(tensor: Any) -> Any:
    _read("tolist")
    return tensor.inner.tolist()


def _get_data(tensor: Any) -> Any:
    return ImaginedTensor(tensor.inner.detach())


def _set_data(tensor: Any, value: Any) -> None:
    assert isinstance(value, ImaginedTensor)
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.data.__set__(tensor, value)
    tensor.inner = value.inner


METHODS: dict[Any, Callable[..., Any]] = {
    Tensor.data_ptr: lambda tensor: tensor.inner.data_ptr(),
    Tensor.untyped_storage: lambda tensor: tensor.inner.untyped_storage(),
    Tensor.tolist: _tolist,
    Tensor.numpy: _no_numpy,
    Tensor.__array__: _no_numpy,
    Tensor.pin_memory: _pin_memory,
    Tensor.is_pinned: lambda *_: False,
    Tensor.data.__get__: _get_data,
    Tensor.data.__set__: _set_data,
}


class State:
    """What the imagined device notes."""

    reads: Counter[str] = Counter()
    capturing: list[Any] | None = None


def _where() -> str:
    frames = [f for f in traceback.extract_stack() if "/mfd_fast/" in f.filename or "/kernels/" in f.filename]
    return "outside" if not frames else f"{frames[-1].filename.split('/mfd_fast/')[-1]}:{frames[-1].lineno} {frames[-1].line}"


def _read(name: str) -> None:
    if State.capturing is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
    State.reads[f"{name} at {_where()}"] += 1


def _check(function: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
    name = function.overloadpacket.__name__
    if name in READS or (function in INDEXED and any(getattr(t, "dtype", None) in (torch.bool, torch.uint8) for t in args[1])):
        _read(name)
    if function in COPIES or name in ("_pin_memory", "set_data"):
        return
    apart = [t for t in tensors if not isinstance(t, ImaginedTensor)]
    if function in INDEXED and isinstance(args[0], ImaginedTensor):
        indices = [t for t in args[1] if t is not None]
        strangers = [t for t in apart if not any(t is i for i in indices)]
        if len(strangers) < len(apart):
            _read(f"{name} with an index from the CPU")
        apart = strangers
    for tensor in apart:
        if tensor.dim() or name in NO_SCALARS:
            shapes = [(tuple(t.shape), str(t.device), t.dtype) for t in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device, but found two: {function} {shapes}")


def _check_copy(function: Any, args: Any, kwargs: Any, device: Any) -> None:
    if function is aten.copy_.default:
        target, source = isinstance(args[0], ImaginedTensor), isinstance(args[1], ImaginedTensor)
        waits_not = bool(args[2]) if len(args) > 2 else kwargs.get("non_blocking", False)
    else:
        source = isinstance(args[0], ImaginedTensor)
        target = source if device is None else device.type == "cuda"
        waits_not = kwargs.get("non_blocking", False)
    if source and not target:
        _read("copy to the host" + (" without waiting" if waits_not else ""))
    elif target and not source:
        if State.capturing is not None and not (function is aten.copy_.default and args[1].dim() == 0):
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
        if not waits_not:
            State.reads[f"blocking copy to the device at {_where()}"] += 1


def dispatch(function: Any, args: Any, kwargs: Any) -> Any:
    if function is aten._efficientzerotensor.default:
        function = aten.zeros.default  # what is known to be zero is no memory that a wrapper could show
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    device = kwargs.get("device")
    device = None if device is None else torch.device(device)
    on = [t for t in tensors if isinstance(t, ImaginedTensor)]
    if not on and (device is None or device.type != "cuda"):
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if function.overloadpacket.__name__ == "_pin_memory":
            return args[0].clone()
        if function.overloadpacket.__name__ == "is_pinned":
            return False
        return function(*args, **kwargs)
    if function in COPIES:
        _check_copy(function, args, kwargs, device)
    elif on:
        _check(function, args, kwargs, tensors)
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu': {function}")
    there = device.type == "cuda" if device is not None else bool(on)
    if function is aten.copy_.default:
        there = isinstance(args[0], ImaginedTensor)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    inner_args, inner_kwargs = tree_map_only(ImaginedTensor, lambda t: t.inner, (args, kwargs))
    result = function(*inner_args, **inner_kwargs)
    if function in COPIES and function is not aten.copy_.default and any(result is t for t in tree_flatten(inner_args)[0]):
        result = result.clone()
    if State.capturing is not None:
        State.capturing.append(tree_map_only(Tensor, Tensor.detach, (function, inner_args, inner_kwargs, result)))
    if not there:
        return result
    known = {id(t.inner): t for t in on}
    return tree_map_only(Tensor, lambda t: known.get(id(t)) if id(t) in known else ImaginedTensor(t), result)


class ImaginedCuda(TorchDispatchMode):
    """Inside of it ``device="cuda"`` is the imagined device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(function, args, kwargs or {})


# The runtime


class Stream:
    """A stream; everything happens at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)

    def synchronize(self) -> None:
        _read("synchronize")

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class Event(Stream):
    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True


def _storages(value: Any) -> set[int]:
    found: set[int] = set()
    tree_map_only(Tensor, lambda tensor: found.add(tensor.untyped_storage().data_ptr()), value)
    return found


def _copy(target: Any, source: Any) -> None:
    if isinstance(target, Tensor):
        target.copy_(source)
    elif isinstance(target, list | tuple):
        for one, other in zip(target, source, strict=True):
            _copy(one, other)


class Graph:
    """Operations with the memory they read and write, repeated on that very memory."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            if _storages(result) & _storages((args, kwargs)):
                if function._schema.is_mutable:
                    function(*args, **kwargs)
                continue
            _copy(result, function(*args, **kwargs))


class Capture:
    def __init__(self, graph: Graph, pool: Any = None, stream: Any = None, **_: Any) -> None:
        self._graph = graph

    def __enter__(self) -> None:
        State.capturing = []

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._graph.calls, State.capturing = State.capturing or [], None


RUNTIME: dict[str, Any] = {
    "is_available": lambda: True,
    "_lazy_init": lambda: None,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "is_bf16_supported": lambda *_: True,
    "get_device_properties": lambda device=None: SimpleNamespace(
        name="imagined", total_memory=24 * 2**30, major=8, minor=6, multi_processor_count=82
    ),
    "get_device_capability": lambda device=None: (8, 6),
    "synchronize": lambda device=None: _read("synchronize"),
    "current_stream": lambda device=None, _stream=Stream(): _stream,
    "Stream": Stream,
    "stream": lambda stream: stream,
    "device": Stream,
    "device_of": Stream,
    "Event": Event,
    "CUDAGraph": Graph,
    "graph": Capture,
    "graph_pool_handle": lambda: (0, 1),
    "empty_cache": lambda: None,
    "reset_peak_memory_stats": lambda device=None: None,
    "max_memory_allocated": lambda device=None: 2**30,
    "memory_allocated": lambda device=None: 2**30,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
    "is_current_stream_capturing": lambda: State.capturing is not None,
}


def _with_index(value: Any) -> Any:
    """A device without its number looks for a driver."""
    if isinstance(value, str) and value == "cuda":
        return CUDA
    return CUDA if isinstance(value, torch.device) and value.type == "cuda" else value


class Placing(TorchFunctionMode):
    """What torch does above its dispatcher: numbers become a tensor on the host first."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        kwargs = {name: _with_index(value) for name, value in (kwargs or {}).items()}
        args = tuple(_with_index(value) for value in args)
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == CUDA:
            if isinstance(args[0], ImaginedTensor):
                return args[0].to(dtype=kwargs.get("dtype"))
            return function(*args, **{**kwargs, "device": "cpu"}).to(CUDA)
        if function is Tensor.cuda:
            return args[0].to(CUDA, non_blocking=kwargs.get("non_blocking", False))
        return function(*args, **kwargs)

