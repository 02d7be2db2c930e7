"""A CUDA device that is not there: its tensors keep their numbers on the CPU and are as particular as those of a GPU.

Operations on tensors of both devices, ``.numpy()``, a generator of the CPU for numbers on the device, and whatever
makes the host wait while a graph is captured are errors here as there. Captured graphs repeat their operations on the
memory of the capture. Where the host waits is counted in `waits`. Nothing is said about order, speed or kernels.

`install` must be called in a process of its own, into which imagined_cuda.cpp was loaded before torch.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_consecutive")
NO_NUMBERS = ("cat", "stack", "index_copy_", "index_select", "gather", "embedding", "mm", "addmm", "bmm")
"""Operations that take no tensor of the CPU at all; others take one without dimensions for a number."""

waits: Counter[str] = Counter()
"""How often the host waited, by what it did and where in this package."""


class Now:
    """What the device is doing."""

    capture: "Graph | None" = None
    waiting_is_an_error = False


class ImaginedTensor(Tensor):
    """A tensor on the device, around one on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "ImaginedTensor":
        place = (inner.size(), inner.stride(), inner.storage_offset())
        made: Any = Tensor._make_wrapper_subclass(cls, *place, dtype=inner.dtype, device=CUDA)
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in METHODS:
            return METHODS[function](*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(function, args, kwargs or {})


def _refused(error: Exception) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    return refuse


def _tolist(tensor: ImaginedTensor) -> Any:
    wait("tolist")
    return tensor.inner.tolist()


def _set_data(tensor: ImaginedTensor, value: ImaginedTensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]
    tensor.inner = value.inner


_NUMPY = _refused(TypeError("can't convert cuda:0 device type tensor to numpy"))
METHODS: dict[Any, Callable[..., Any]] = {
    Tensor.numpy: _NUMPY,
    Tensor.__array__: _NUMPY,
    Tensor.pin_memory: _refused(RuntimeError("only dense CPU tensors can be pinned")),
    Tensor.tolist: _tolist,
    Tensor.data_ptr: lambda tensor: tensor.inner.data_ptr(),
    Tensor.untyped_storage: lambda tensor: tensor.inner.untyped_storage(),
    Tensor.data.__get__: lambda tensor: ImaginedTensor(tensor.inner.detach()),  # type: ignore[attr-defined]
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}
"""What torch does without its dispatcher."""


def wait(what: str) -> None:
    """The host waits for the device."""
    if Now.capture is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
    if Now.waiting_is_an_error:
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
    frames = [frame for frame in traceback.extract_stack() if "/mfd_fast/" in frame.filename]
    place = f"{frames[-1].filename.rpartition('/mfd_fast/')[2]}:{frames[-1].lineno}" if frames else "elsewhere"
    waits[f"{what} in {place}"] += 1


def _check_copy(to_device: bool, source: Tensor, non_blocking: bool) -> None:
    from_device = isinstance(source, ImaginedTensor)
    if from_device and not to_device:
        if not non_blocking:
            wait("copy to the host")
    elif to_device and not from_device and (Now.capture is not None or not non_blocking):
        wait("copy to the device")


def _check(name: str, args: Any, tensors: Iterable[Tensor]) -> None:
    """What only a device minds."""
    strangers = [tensor for tensor in tensors if not isinstance(tensor, ImaginedTensor)]
    if name in INDEXED:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype == torch.bool for index in indices):
            wait(f"{name} by a mask")
        if isinstance(args[0], ImaginedTensor) and any(not isinstance(index, ImaginedTensor) for index in indices):
            wait(f"{name} by an index on the host")
            strangers = [tensor for tensor in strangers if all(tensor is not index for index in indices)]
    if name == "where" and strangers:
        wait("where with a tensor of the host")
    if name in READS:
        wait(name)
    if any(tensor.dim() or name in NO_NUMBERS for tensor in strangers):
        places = [f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors]
        raise RuntimeError(f"{name} expects all tensors to be on the same device: {', '.join(places)}")


def dispatch(function: Any, args: Any, kwargs: Any) -> Any:
    """An operation of torch, computed on the CPU."""
    name = function.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, ImaginedTensor)}
    device = kwargs.get("device")
    on_device = bool(ours) if device is None else torch.device(device).type == "cuda"
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if name == "_pin_memory":
        return args[0].clone()
    if not ours and not on_device:
        return function(*args, **kwargs)
    if function in COPIES:
        if name == "copy_":
            on_device = isinstance(args[0], ImaginedTensor)
        non_blocking = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
        _check_copy(on_device, args[1] if name == "copy_" else args[0], bool(non_blocking))
    elif ours:
        _check(name, args, tensors)
    if on_device and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")
    if name == "_efficientzerotensor":
        function = aten.zeros.default  # a wrapper cannot show what it leaves out
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map_only(ImaginedTensor, lambda tensor: tensor.inner, (args, kwargs))
    result = function(*args, **kwargs)
    if Now.capture is not None:
        Now.capture.add(function, args, kwargs, result)
    if not on_device:
        return result
    return tree_map_only(
        Tensor, lambda tensor: ours[id(tensor)] if id(tensor) in ours else ImaginedTensor(tensor), result
    )


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(function, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch does before its dispatcher."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return function(*args, **{**kwargs, "device": "cpu"}).to(CUDA)
        return function(*args, **kwargs)


class Graph:
    """Operations and the memory that they read and write, to be repeated on that very memory."""

    def __init__(self) -> None:
        self._calls: list[Any] = []

    def add(self, *call: Any) -> None:
        """Write down function, arguments and result; tensors that get other memory later keep that of now."""
        self._calls.append(tree_map_only(Tensor, Tensor.detach, call))

    def replay(self) -> None:
        """Do all of it again."""
        for function, args, kwargs, result in self._calls:
            is_view = bool(_memory(result) & _memory((args, kwargs)))
            if is_view and not function._schema.is_mutable:
                continue  # it shows what its memory holds
            again = function(*args, **kwargs)
            if not is_view:
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


def _memory(value: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}


class _Capture:
    def __init__(self, graph: Graph, *_: Any, **__: Any) -> None:
        self._graph = graph

    def __enter__(self) -> None:
        wait("synchronize")
        Now.capture = self._graph

    def __exit__(self, *_: Any) -> None:
        Now.capture = None


class _Nothing:
    """A stream, an event or a current device; everything happens at once here."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *_: Any) -> None: ...
    def wait_stream(self, other: "_Nothing") -> None: ...
    def record(self, stream: "_Nothing") -> None: ...
    def query(self) -> bool:
        return True


def _set_sync_debug_mode(mode: int | str) -> None:
    Now.waiting_is_an_error = mode in (2, "error")


STREAM = _Nothing()
RUNTIME: dict[str, Any] = {
    **{name: _Nothing for name in ("Stream", "Event", "device", "device_of")},
    **{name: lambda *_: None for name in ("_lazy_init", "set_device", "empty_cache", "set_rng_state")},
    **{name: lambda *_: True for name in ("is_available", "is_initialized", "is_bf16_supported")},
    "CUDAGraph": Graph,
    "graph": _Capture,
    "graph_pool_handle": lambda: (0, 1),
    "current_stream": lambda device=None: STREAM,
    "stream": lambda stream: stream,
    "synchronize": lambda device=None: wait("synchronize"),
    "get_sync_debug_mode": lambda: 2 * Now.waiting_is_an_error,
    "set_sync_debug_mode": _set_sync_debug_mode,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_capability": lambda device=None: (8, 6),
    "get_device_properties": lambda device=None: SimpleNamespace(name="imagined", total_memory=2**34, major=8, minor=6),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
}
"""What takes the place of functions of `torch.cuda`."""


def install() -> None:
    """From now on the device is there."""
    for name, value in RUNTIME.items():
        setattr(torch.cuda, name, value)
    torch.__future__.set_swap_module_params_on_conversion(True)
    _Operations().__enter__()
    _Functions().__enter__()
