"""Arrays from an npz file that somebody else may have made: no pickle, and no size is believed before it is checked."""

import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_BYTES = 8 << 30
"""Most that the arrays of one file may take, unless the caller knows better."""
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_KINDS = "biuf"
_HEADER_DAMAGES = (ValueError, SyntaxError, tokenize.TokenError, TypeError, RecursionError, MemoryError)
"""numpy takes a header as Python's words for a dictionary."""
_DAMAGES = (
    *(ValueError, zipfile.BadZipFile, zlib.error, EOFError, KeyError),
    OSError,  # a place outside of the file
    RuntimeError,  # encrypted
    NotImplementedError,  # a compression that nobody uses
)


def read_arrays(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, NDArray[Any]]:
    """The arrays of numbers in an npz file by name.

    Raises:
        ValueError: the file is damaged, would take more than ``most_bytes``, or holds anything but numbers.
    """
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
                total = sum(entry.file_size for entry in entries)
                if total > most_bytes:
                    raise ValueError(f"holds {total} bytes, the most allowed is {most_bytes}")
                return {entry.filename.removesuffix(".npy"): _read(archive, entry) for entry in entries}
        except _DAMAGES as error:
            raise ValueError(f"{path} is not a readable npz file: {error or type(error).__name__}") from error


def as_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """``array`` in float32; what does not fit becomes infinite."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NDArray[Any]:
    """One array; its header must promise exactly as many bytes as the archive's index does."""
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{entry.filename}: format version {version} is not known")
        try:
            shape, column_order, dtype = _HEADERS[version](file)
        except _HEADER_DAMAGES as error:
            raise ValueError(f"{entry.filename}: its header cannot be read") from error
        if dtype.kind not in _KINDS or dtype.hasobject:
            raise ValueError(f"{entry.filename}: expected numbers, got {dtype}")
        if any(side < 0 for side in shape):
            raise ValueError(f"{entry.filename}: its shape {shape} is negative")
        promised = math.prod(shape) * dtype.itemsize
        if promised > entry.file_size:
            raise ValueError(f"{entry.filename}: its shape needs {promised} bytes, there are {entry.file_size}")
        content = file.read(promised + 1)
    if len(content) != promised:
        raise ValueError(f"{entry.filename}: its shape needs {promised} bytes, not what is there")
    array = np.frombuffer(bytearray(content), dtype=dtype)
    return array.reshape(shape, order="F" if column_order else "C")
