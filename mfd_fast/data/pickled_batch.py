"""Read a CIFAR-10 python batch without running anything that the pickle names.

A pickle can only call what `Unpickler.find_class` hands it. Here that is an inert stand-in for each of the few names
that a pickled numpy array mentions; it keeps what it is given, and numpy itself never sees an unchecked value.
"""

import io
import pickle
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ARRAY, _TYPE, _ENCODE, _CLASS = "array", "type", "encode", "class"
ALLOWED_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _ARRAY,
    ("numpy", "dtype"): _TYPE,
    ("numpy", "ndarray"): _CLASS,
    ("_codecs", "encode"): _ENCODE,
}


def read_pickled_batch(content: bytes, sample_size: int) -> tuple[Tensor, list[int]]:
    """The pixels ``[N, sample_size]`` uint8 and the labels of one pickled CIFAR-10 batch.

    Raises ValueError for a pickle that names anything but a plain array, or that holds no such batch.
    """
    try:
        batch = _InertUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a broken pickle can raise nearly anything
        raise ValueError(f"not a readable batch: {error}") from error
    if not isinstance(batch, dict):
        raise ValueError(f"expected a dictionary, got {type(batch).__name__}")
    pixels, labels = batch.get(b"data", batch.get("data")), batch.get(b"labels", batch.get("labels"))
    if not isinstance(pixels, _Record) or pixels.kind != _ARRAY:
        raise ValueError(f"expected a numpy array under 'data', got {type(pixels).__name__}")
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise ValueError("expected a list of whole numbers under 'labels'")
    return _array(pixels, sample_size), labels


class _Record:
    """What a pickle said about an array or its type; keeps it and does nothing."""

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self.kind = kind
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Name:
    """Stands in for an allowed function or class."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, *arguments: Any) -> Any:
        if self.kind == _CLASS:
            raise pickle.UnpicklingError("numpy.ndarray is not called in a batch")
        if self.kind == _ENCODE:
            text, encoding = arguments
            if not isinstance(text, str) or encoding != "latin1":
                raise pickle.UnpicklingError("only latin1 text stands for bytes in a batch")
            return text.encode("latin1")
        return _Record(self.kind, arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function has no state in a batch")


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        kind = ALLOWED_NAMES.get((module_name, global_name))
        if kind is None:
            raise pickle.UnpicklingError(f"the pickle asks for {module_name}.{global_name}, which is refused")
        return _Name(kind)


def _array(record: _Record, sample_size: int) -> Tensor:
    """The array ``[N, sample_size]`` uint8 that a record describes, after every part of it has been checked."""
    state = record.state
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("expected a pickled numpy array under 'data'")
    _, shape, dtype, column_order, buffer = state
    if not isinstance(dtype, _Record) or dtype.kind != _TYPE or dtype.arguments[:1] not in ((b"u1",), ("u1",)):
        raise ValueError("expected an array of uint8 under 'data'")
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[1] != sample_size or type(shape[0]) is not int:
        raise ValueError(f"expected an array of shape (N, {sample_size}) under 'data', got {shape}")
    if not isinstance(buffer, bytes) or len(buffer) != shape[0] * sample_size:
        size = len(buffer) if isinstance(buffer, bytes) else type(buffer).__name__
        raise ValueError(f"expected {shape[0] * sample_size} bytes for the array of shape {shape}, got {size}")
    flat = np.frombuffer(buffer, dtype=np.uint8)
    return torch.from_numpy(flat.reshape(shape, order="F" if column_order else "C").copy())
