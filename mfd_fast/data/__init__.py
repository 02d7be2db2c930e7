"""Datasets by name. To add one, write a function that returns a `Dataset` and add its line to `DATASETS`."""

import importlib
import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mfd_fast.data.dataset import Dataset

__all__ = ["DATASETS", "Dataset", "load_dataset"]

DATASETS: dict[str, str] = {
    "digits": "mfd_fast.data.digits:digits",
    "cifar10": "mfd_fast.data.cifar10:cifar10",
    "gaussian-2d": "mfd_fast.data.densities:gaussian_2d",
    "mixture-2d": "mfd_fast.data.densities:mixture_2d",
    "grid-2d": "mfd_fast.data.densities:grid_2d",
    "occupancy": "mfd_fast.data.occupancy:occupancy",
    "occupancy-toy": "mfd_fast.data.occupancy:occupancy_toy",
    "prompts": "mfd_fast.data.prompts:prompts",
    "npz": "mfd_fast.data.arrays:npz",
}


def load_dataset(name: str, root: str | Path | None = None, **options: Any) -> Dataset:
    """The dataset called ``name``; ``root`` is the folder of its files, for a dataset that has files.

    ``options`` are the keyword arguments of the function in `DATASETS`. Raises ValueError for an unknown name or
    option, or a ``root`` that the dataset has no use for.
    """
    if name not in DATASETS:
        raise ValueError(f"name: {_unknown('dataset', name, DATASETS)}")
    module, function_name = DATASETS[name].split(":")
    function: Callable[..., Dataset] = getattr(importlib.import_module(module), function_name)
    known = inspect.signature(function).parameters.keys()
    for option in options:
        if option not in known - {"root"}:
            raise ValueError(f"options: {_unknown(f'option of dataset {name!r}', option, known - {'root'})}")
    if root is not None:
        if "root" not in known:
            raise ValueError(f"root: dataset {name!r} has no files: leave data.root out, got {str(root)!r}")
        options["root"] = Path(root)
    return function(**options)


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    nearest = get_close_matches(name[:200], names, n=1, cutoff=0.0)
    if not nearest:
        return f"no {kind} takes the name {name!r}; there are none"
    return f"unknown {kind} {name!r}; did you mean {nearest[0]!r}? Known: {', '.join(names)}"
