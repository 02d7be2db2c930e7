"""Samples of your own from an npz file, of any shape, with labels or other conditions by name."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfd_fast.data.dataset import Dataset
from mfd_fast.npz import as_float32, read_arrays

SPLIT_SEED = 20_240_601


def npz(root: Path | None = None, pictures: bool = False, held_out: float = 0.1) -> Dataset:
    """The arrays of an npz file: ``x`` ``[N, ...]``, and where there are any ``label`` and conditions by their names.

    Every array has N rows. ``label`` ``[N]`` is for networks with ``num_classes``: whole numbers from 0, as many
    classes as the largest says. Any other array is handed to the network as the keyword argument of its name, whole
    numbers as int64, booleans as they are, others as float32. Which rows are held out does not depend on the seed of a
    run.

    Args:
        root: the file.
        pictures: ``x`` is ``[N, C, H, W]`` in [-1, 1], or uint8; samples are clipped to that range and shown.
        held_out: share of the rows that are never trained on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no root; the file is damaged; what is in it is not as above.
    """
    if root is None:
        raise ValueError("root: dataset 'npz' is read from a file: give it (--set data.root=FILE.npz), got None")
    if not root.is_file():
        raise FileNotFoundError(f"root: expected an npz file, {root} is none")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share above 0 and below 1, got {held_out}")
    arrays = read_arrays(root)
    if "x" not in arrays:
        raise ValueError(f"root: {root} has no array 'x', only {', '.join(sorted(arrays)) or 'nothing'}")
    x = _samples(root, arrays.pop("x"), pictures)
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != len(x):
            raise ValueError(f"root: {root}: {name!r} needs {len(x)} rows, as 'x' has, got shape {list(array.shape)}")
    label = _labels(root, arrays.pop("label")) if "label" in arrays else None
    conditions = {name: _condition(root, name, array) for name, array in arrays.items()}
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    aside, kept = (part.sort().values for part in order.tensor_split([max(1, round(held_out * len(x)))]))
    return Dataset(
        name="npz",
        x=x[kept],
        label=None if label is None else label[kept],
        held_out_x=x[aside],
        held_out_label=None if label is None else label[aside],
        num_classes=None if label is None else int(label.max()) + 1,
        value_range=(-1.0, 1.0) if pictures else None,
        conditions={name: rows[kept] for name, rows in conditions.items()},
        held_out_conditions={name: rows[aside] for name, rows in conditions.items()},
    )


def _samples(root: Path, array: NDArray[Any], pictures: bool) -> Tensor:
    if array.ndim < 2 or len(array) < 2:
        raise ValueError(f"root: {root}: 'x' needs shape [N, ...] with at least two rows, got {list(array.shape)}")
    x = _finite(root, "x", array)
    if not pictures:
        return x
    if array.dtype == np.uint8:
        x = x.div_(127.5).sub_(1)
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"root: {root}: pictures need shape [N, 1 or 3, H, W], got {list(array.shape)}")
    if float(x.abs().max()) > 1 + 1e-6:
        low, high = float(x.min()), float(x.max())
        raise ValueError(f"root: {root}: pictures need values in [-1, 1], or uint8, got {low:g} to {high:g}")
    return x


def _labels(root: Path, array: NDArray[Any]) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim != 1 or int(array.min()) < 0:
        shape = list(array.shape)
        raise ValueError(f"root: {root}: 'label' needs [N] whole numbers from 0, got {array.dtype} of shape {shape}")
    if int(array.max()) >= len(array):  # identifiers, say: a network would get a class for each number up to them
        raise ValueError(f"root: {root}: 'label' numbers classes from 0, got {array.max()} in {len(array)} rows")
    return torch.from_numpy(array.astype(np.int64))


def _condition(root: Path, name: str, array: NDArray[Any]) -> Tensor:
    if array.dtype.kind == "b":
        return torch.from_numpy(array)
    return torch.from_numpy(array.astype(np.int64)) if array.dtype.kind in "iu" else _finite(root, name, array)


def _finite(root: Path, name: str, array: NDArray[Any]) -> Tensor:
    """In float32; ValueError for what is not finite there."""
    values = torch.from_numpy(np.ascontiguousarray(as_float32(array)))
    if not bool(values.isfinite().all()):
        raise ValueError(f"root: {root}: {name!r} holds numbers that are not finite in float32")
    return values
