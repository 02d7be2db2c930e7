<<<<<<< HEAD
"""Read a CIFAR-10 python batch without executing the pickle.

The file is only taken apart into its instructions (`pickletools.genops`, which runs nothing). A machine of the few
instructions that a pickled batch consists of puts them together to plain values and inert records; any other
instruction, and any name but the few that a pickled numpy array mentions, is refused. What is built is not larger than
the file, and no value that came from the file is hashed or shown unless it is a text.
"""

import pickletools
from collections.abc import Callable
from typing import Any
=======
"""Read a CIFAR-10 python batch without running anything that the pickle names."""

import io
>>>>>>> 6c92520 (OccFM: transition model, latents, IoU and evaluation, first version end to end)

import numpy as np
import torch
from torch import Tensor

<<<<<<< HEAD
_ARRAY, _TYPE, _ENCODE, _CLASS = "array", "type", "encode", "class"
ALLOWED_NAMES = {
    "numpy.core.multiarray _reconstruct": _ARRAY,
    "numpy._core.multiarray _reconstruct": _ARRAY,
    "numpy dtype": _TYPE,
    "numpy ndarray": _CLASS,
    "_codecs encode": _ENCODE,
}
=======
from mfd_fast.data.plain_pickle import read_plain_pickle
>>>>>>> 6c92520 (OccFM: transition model, latents, IoU and evaluation, first version end to end)


def read_pickled_batch(content: bytes, sample_size: int) -> tuple[Tensor, list[int]]:
    """The pixels ``[N, sample_size]`` uint8 and the labels of one pickled CIFAR-10 batch.

    Raises ValueError for a pickle that names anything but a plain array, or that holds no such batch.
    """
<<<<<<< HEAD
    try:
        batch = _Machine().run(content)
    except (ValueError, LookupError, TypeError, UnicodeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not a readable batch: {error}") from error
    if not isinstance(batch, dict):
        raise ValueError(f"expected a dictionary, got {type(batch).__name__}")
    pixels, labels = batch.get("data"), batch.get("labels")
    if not isinstance(pixels, _Record) or pixels.kind != _ARRAY:
=======
    batch = read_plain_pickle(io.BytesIO(content), encoding="bytes")
    if not isinstance(batch, dict):
        raise ValueError(f"expected a dictionary, got {type(batch).__name__}")
    pixels, labels = batch.get(b"data", batch.get("data")), batch.get(b"labels", batch.get("labels"))
    if not isinstance(pixels, np.ndarray):
>>>>>>> 6c92520 (OccFM: transition model, latents, IoU and evaluation, first version end to end)
        raise ValueError(f"expected a numpy array under 'data', got {type(pixels).__name__}")
    if pixels.dtype != np.uint8:
        raise ValueError("expected an array of uint8 under 'data'")
    if pixels.ndim != 2 or pixels.shape[1] != sample_size:
        raise ValueError(f"expected an array of shape (N, {sample_size}) under 'data', got {pixels.shape}")
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise ValueError("expected a list of whole numbers under 'labels'")
<<<<<<< HEAD
    return _array(pixels, sample_size), labels


class _Record:
    """What a pickle said about an array or its type; keeps it and does nothing."""

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self.kind = kind
        self.arguments = arguments
        self.state: Any = None


class _Name:
    """Stands in for an allowed function or class."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def call(self, arguments: Any) -> Any:
        """What calling it gives: a record, or for a text that stands for bytes those bytes."""
        if not isinstance(arguments, tuple):
            raise ValueError("arguments come as a tuple")
        if self.kind == _CLASS:
            raise ValueError("numpy.ndarray is not called in a batch")
        if self.kind == _ENCODE:
            if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] != "latin1":
                raise ValueError("only latin1 text stands for bytes in a batch")
            return arguments[0].encode("latin1")
        return _Record(self.kind, arguments)


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "INT", "LONG")
_TEXTS = ("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINUNICODE", "SHORT_BINUNICODE")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack and the memory that the instructions work on."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memory: dict[int, Any] = {}
        self._steps: dict[str, Callable[[], None]] = {
            "EMPTY_DICT": lambda: self._stack.append({}),
            "EMPTY_LIST": lambda: self._stack.append([]),
            "EMPTY_TUPLE": lambda: self._stack.append(()),
            "MARK": lambda: self._stack.append(_MARK),
            "TUPLE": lambda: self._stack.append(tuple(self._since_mark())),
            "LIST": lambda: self._stack.append(self._since_mark()),
            "DICT": lambda: self._stack.append(_pairs(self._since_mark())),
            "APPEND": lambda: self._extend([self._stack.pop()]),
            "APPENDS": lambda: self._extend(self._since_mark()),
            "SETITEM": lambda: self._set(reversed([self._stack.pop(), self._stack.pop()])),
            "SETITEMS": lambda: self._set(self._since_mark()),
            "REDUCE": self._reduce,
            "BUILD": self._build,
            "MEMOIZE": lambda: self._memory.__setitem__(len(self._memory), self._stack[-1]),
        }

    def run(self, content: bytes) -> Any:
        """The value that the pickle describes."""
        for code, argument, _ in pickletools.genops(content):
            name = code.name
            if name in _NUMBERS or name in _TEXTS:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _TUPLES:
                self._stack.append(tuple(self._pop(_TUPLES[name])))
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                self._memory[int(argument or 0)] = self._stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self._stack.append(self._memory[int(argument or 0)])
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                self._stack.append(self._named(argument if name == "GLOBAL" else " ".join(self._pop(2))))
            elif name in self._steps:
                self._steps[name]()
            elif name == "STOP":
                return self._stack.pop()
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"the instruction {name} has no place in a batch")
        raise ValueError("it has no end")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("a value is missing")
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return taken

    def _since_mark(self) -> list[Any]:
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("a mark is missing")
        taken = self._stack[place + 1 :]
        del self._stack[place:]
        return taken

    def _named(self, name: Any) -> _Name:
        if name not in ALLOWED_NAMES:
            raise ValueError(f"the pickle asks for {str(name).replace(' ', '.')}, which is refused")
        return _Name(ALLOWED_NAMES[name])

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise ValueError("only a list grows")
        self._stack[-1].extend(values)

    def _set(self, values: Any) -> None:
        if not isinstance(self._stack[-1], dict):
            raise ValueError("only a dictionary takes entries")
        self._stack[-1].update(_pairs(list(values)))

    def _reduce(self) -> None:
        function, arguments = self._pop(2)
        if not isinstance(function, _Name):
            raise ValueError("something is called that is no function")
        self._stack.append(function.call(arguments))

    def _build(self) -> None:
        state = self._stack.pop()
        if not isinstance(self._stack[-1], _Record):
            raise ValueError("only an array or its type has a state")
        self._stack[-1].state = state


def _pairs(values: list[Any]) -> dict[str, Any]:
    """A dictionary of keys and values in turn; keys are texts, however they were written."""
    keys = [key.decode("latin1") if isinstance(key, bytes) else key for key in values[::2]]
    if len(values) % 2 or not all(isinstance(key, str) for key in keys):
        raise ValueError("a dictionary has texts as keys, each with a value")
    return dict(zip(keys, values[1::2], strict=True))


def _array(record: _Record, sample_size: int) -> Tensor:
    """The array ``[N, sample_size]`` uint8 that a record describes, after every part of it has been checked."""
    state = record.state
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("expected a pickled numpy array under 'data'")
    _, shape, dtype, column_order, buffer = state
    if not isinstance(dtype, _Record) or dtype.kind != _TYPE or _text(dtype.arguments[:1]) != "u1":
        raise ValueError("expected an array of uint8 under 'data'")
    if not isinstance(shape, tuple) or [type(side) for side in shape] != [int, int] or shape[1] != sample_size:
        shown = shape if isinstance(shape, tuple) and all(type(side) is int for side in shape[:4]) else "no shape"
        raise ValueError(f"expected an array of shape (N, {sample_size}) under 'data', got {shown}")
    buffer = buffer.encode("latin1") if isinstance(buffer, str) else buffer  # Python 2 had one type for both
    if not isinstance(buffer, bytes) or len(buffer) != shape[0] * sample_size:
        size = len(buffer) if isinstance(buffer, bytes) else type(buffer).__name__
        raise ValueError(f"expected {shape[0] * sample_size} bytes for the array of shape {shape}, got {size}")
    flat = np.frombuffer(buffer, dtype=np.uint8)
    return torch.from_numpy(flat.reshape(shape, order="F" if column_order is True or column_order == 1 else "C").copy())


def _text(values: tuple[Any, ...]) -> str | None:
    value = values[0] if values else None
    return value.decode("latin1") if isinstance(value, bytes) else value if isinstance(value, str) else None
=======
    return torch.from_numpy(pixels.copy()), labels
>>>>>>> 6c92520 (OccFM: transition model, latents, IoU and evaluation, first version end to end)
