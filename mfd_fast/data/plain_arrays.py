"""What a pickle says of numpy arrays, kept as it is and checked before numpy sees it; see `plain_pickle`."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUMERIC = re.compile(r"[biufSU]\d+")
_OBJECT = re.compile(r"O\d*")


class Refused(ValueError):
    """Something that no pickle of arrays does."""


class Inert:
    """Whatever a pickle builds besides containers and scalars; remembers, and does nothing."""


class Type(Inert):
    """``numpy.dtype(code, ...)`` with the state ``(version, byte order, None, None, None, ...)``."""

    def __init__(self, code: Any, *_: Any) -> None:
        text = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(text, str) or not (_NUMERIC.fullmatch(text) or _OBJECT.fullmatch(text)):
            raise Refused(f"arrays of type {text!r} are refused" if isinstance(text, str) else "a type has no name")
        self.holds_objects = text.startswith("O")
        self._code, self._order = text, "="

    def set_state(self, state: Any, _: Callable[[Any], Any]) -> None:
        """Take the byte order; a type with fields is refused."""
        order = state[1] if isinstance(state, tuple) and len(state) >= 5 else None
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise Refused("arrays with fields are refused")
        self._order = order

    @property
    def plain(self) -> "np.dtype[Any]":
        """The type with its byte order."""
        return np.dtype("O") if self.holds_objects else np.dtype(f"{self._order}{self._code}")


class Array(Inert):
    """``numpy.core.multiarray._reconstruct(...)`` with the state ``(version, shape, type, column order, content)``."""

    def __init__(self, *_: Any) -> None:
        self._value: NDArray[Any] | None = None

    def set_state(self, state: Any, resolve: Callable[[Any], Any]) -> None:
        """Become the array that the state describes; ``resolve`` makes plain values of what it holds."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused("an array has a state of another form")
        _, shape, kind, column_order, content = state
        in_columns = column_order is True or (type(column_order) is int and column_order == 1)
        self._value = _array(shape, kind, "F" if in_columns else "C", content, resolve)

    def plain(self) -> NDArray[Any]:
        """The array."""
        if self._value is None:
            raise Refused("an array has no content")
        return self._value


def array_from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> NDArray[Any]:
    """``numpy.core.numeric._frombuffer``: an array as protocol 5 writes it."""
    return _array(shape, kind, order, content, None)


def scalar(kind: Any, content: Any) -> Any:
    """``numpy.core.multiarray.scalar``, as a number or text of Python."""
    return _array((1,), kind, "C", content, None)[0].item()


def encode(text: Any, encoding: Any) -> bytes:
    """``_codecs.encode``: how old protocols write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused("only latin1 text stands for bytes")
    return text.encode("latin1")


def _array(shape: Any, kind: Any, order: Any, content: Any, resolve: Callable[[Any], Any] | None) -> NDArray[Any]:
    """An array of checked parts; ``content`` is bytes, or a list for an array of objects."""
    if not isinstance(shape, tuple) or len(shape) > 32 or any(type(size) is not int or size < 0 for size in shape):
        raise Refused("an array has no shape of whole numbers")
    if not isinstance(kind, Type) or order not in ("C", "F"):
        raise Refused("an array has no plain type")
    count = math.prod(shape)
    if kind.holds_objects:
        if resolve is None or not isinstance(content, list) or len(content) != count:
            raise Refused(f"an array of {count} objects has other content")
        objects = np.empty(count, dtype=object)
        objects[:] = [resolve(item) for item in content]
        return objects.reshape(shape, order=order)
    content = content.encode("latin1") if isinstance(content, str) else content  # Python 2 had one type for both
    dtype = kind.plain
    if not isinstance(content, bytes | bytearray) or len(content) != count * dtype.itemsize:
        size = f"{len(content)} bytes" if isinstance(content, bytes | bytearray) else type(content).__name__
        raise Refused(f"expected {count * dtype.itemsize} bytes for an array of shape {shape}, got {size}")
    return np.frombuffer(content, dtype=dtype, count=count).reshape(shape, order=order)
