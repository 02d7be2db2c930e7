"""Read a pickle of numpy arrays, containers and scalars without running anything that it names.

A pickle can only call what `Unpickler.find_class` hands it. Here that is an inert stand-in for each of the few names
that numpy arrays mention. A stand-in keeps what it is given, checks it, and numpy sees nothing but checked bytes.
"""

import pickle
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

_NUMERIC = re.compile(r"[biufSU]\d+")
_OBJECT = re.compile(r"O\d*")


def read_plain_pickle(stream: BinaryIO, encoding: str = "ASCII") -> Any:
    """What a pickle holds: dicts, lists, tuples, sets, plain scalars and numpy arrays of those.

    Args:
        stream: the pickle.
        encoding: of texts that Python 2 wrote, "bytes" to leave them as they are.

    Raises:
        ValueError: the pickle names anything else (which is not called), is cut off, or describes an array wrongly.
    """
    try:
        return _resolve(_InertUnpickler(stream, encoding=encoding).load(), {})
    except Exception as error:  # a broken pickle can raise nearly anything
        raise ValueError(f"not a readable pickle of arrays: {error or type(error).__name__}") from error


class _Refused(pickle.UnpicklingError):
    """Something that no pickle of arrays does."""


class _Inert:
    """Whatever a pickle builds besides containers and scalars; remembers, and does nothing."""

    def __setstate__(self, state: Any) -> None:
        raise _Refused(f"the state of a {type(self).__name__.strip('_').lower()} is set, which is refused")


class _Type(_Inert):
    """``numpy.dtype(code, False, True)`` with the state ``(version, byte order, None, None, None, ...)``."""

    def __init__(self, code: Any, *_: Any) -> None:
        text = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(text, str) or not (_NUMERIC.fullmatch(text) or _OBJECT.fullmatch(text)):
            raise _Refused(f"arrays of type {code!r} are refused")
        self.holds_objects = text.startswith("O")
        self._code, self._order = text, "|"

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) >= 5 else None
        order = order.decode("ascii") if isinstance(order, bytes) else order
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise _Refused("arrays with fields are refused")
        self._order = order

    @property
    def plain(self) -> "np.dtype[Any]":
        """The type with its byte order."""
        return np.dtype("O") if self.holds_objects else np.dtype(f"{self._order}{self._code}")


class _Array(_Inert):
    """``numpy.core.multiarray._reconstruct(...)`` with the state ``(version, shape, type, column order, content)``."""

    def __init__(self, *_: Any) -> None:
        self.value: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refused("an array has a state of another form")
        _, shape, kind, column_order, content = state
        self.value = _array(shape, kind, "F" if column_order else "C", content)


def _array(shape: Any, kind: Any, order: Any, content: Any) -> NDArray[Any]:
    """An array of checked parts; ``content`` is bytes, or a list for an array of objects."""
    if not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in shape):
        raise _Refused(f"an array has the shape {shape!r}")
    if not isinstance(kind, _Type) or order not in ("C", "F"):
        raise _Refused("an array has no plain type")
    count = int(np.prod(shape, dtype=object))
    if kind.holds_objects:
        if not isinstance(content, list) or len(content) != count:
            raise _Refused(f"an array of {count} objects has other content")
        objects = np.empty(count, dtype=object)
        objects[:] = [_resolve(item, {}) for item in content]
        return objects.reshape(shape, order=order)
    dtype = kind.plain
    if not isinstance(content, bytes | bytearray) or len(content) != count * dtype.itemsize:
        size = f"{len(content)} bytes" if isinstance(content, bytes | bytearray) else type(content).__name__
        raise _Refused(f"expected {count * dtype.itemsize} bytes for an array of shape {shape}, got {size}")
    return np.frombuffer(content, dtype=dtype, count=count).reshape(shape, order=order)


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.value = _array(shape, kind, order, content)
    return array


def _scalar(kind: Any, content: Any) -> Any:
    if not isinstance(kind, _Type) or kind.holds_objects:
        raise _Refused("a scalar has no plain type")
    return _array((1,), kind, "C", content)[0].item()


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused("only latin1 text stands for bytes")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _set(items: Any) -> set[Any]:
    if not isinstance(items, list):
        raise _Refused("a set is made of something that is no list")
    return set(items)


def _no_call(*_: Any) -> Any:
    raise _Refused("numpy.ndarray is called, which no pickle of arrays does")


class _Name(_Inert):
    """Stands in for an allowed function or class."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _no_call,
    ("_codecs", "encode"): _encode,
    # How protocol 2 writes b"" and sets.
    ("__builtin__", "bytes"): _no_bytes,
    ("__builtin__", "set"): _set,
}
for _module in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_module}.multiarray", "_reconstruct"] = _Array
    _ALLOWED[f"{_module}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_module}.numeric", "_frombuffer"] = _from_buffer


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        function = _ALLOWED.get((module_name, global_name))
        if function is None:
            raise _Refused(f"the pickle asks for {module_name}.{global_name}, which is refused")
        return _Name(function)


def _resolve(value: Any, known: dict[int, Any]) -> Any:
    """``value`` with arrays in place of what describes them; containers met twice are resolved once."""
    if isinstance(value, _Array):
        if value.value is None:
            raise _Refused("an array has no content")
        return value.value
    if isinstance(value, _Inert):
        raise _Refused("a name or type of numpy stands where a value should be")
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) not in known:
        known[id(value)] = None  # met again before it is finished: a container inside itself
        if isinstance(value, dict):
            known[id(value)] = {key: _resolve(item, known) for key, item in value.items()}
        else:
            known[id(value)] = type(value)(_resolve(item, known) for item in value)
    if known[id(value)] is None:
        raise _Refused("a container holds itself")
    return known[id(value)]
