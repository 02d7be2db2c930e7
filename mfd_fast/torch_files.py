"""Weights in files of ``torch.save``, which are zip archives with a pickle, read without executing it or believing it.

`torch.load` with ``weights_only`` runs nothing that a pickle names. It does take the sizes in the file for granted, and
hashes whatever a pickle makes a key; so both are looked at before.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfd_fast.data.plain_pickle import check_keys

MOST_TIMES = 16
"""What all tensors may take together, in sizes of the file: a memory may have several names, but not any number."""


def read_torch_file(path: Path) -> Any:
    """What a file of ``torch.save`` holds, on the CPU: tensors, containers and plain values, nothing else.

    Raises:
        ValueError: the file is damaged, older than torch 1.6, unfolds beyond its size, or asks for something else.
    """
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_sizes(content, path.stat().st_size)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else "it is no pickle of tensors and plain values"
        raise ValueError(f"{path} does not hold plain weights and was not loaded: {reason}") from error
    except Exception as error:  # torch names no class for a damaged file
        raise ValueError(f"{path} is damaged or holds no weights: {' '.join(str(error).split())[:300]}") from error
    return content


def _check_archive(path: Path) -> None:
    """The archive holds its files as they are, so none unfolds, and its pickle has plain keys."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"{entry.filename} is compressed, which torch.save does not do")
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                with archive.open(name) as stream:
                    check_keys(stream)


def _check_sizes(content: Any, size: int) -> None:
    """A tensor may repeat its memory by its strides, and many may share one: together they stay in bounds."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(content))
    if total > MOST_TIMES * size:
        raise ValueError(f"its tensors unfold to {total} bytes, it has {size}")


def _tensors(content: Any) -> Iterator[Tensor]:
    """All tensors in a tree of containers; a container that holds itself is entered once."""
    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
