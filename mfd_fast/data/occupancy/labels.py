"""Occupancy grids of Occ3D-nuScenes: their classes, and the files they come in."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mfd_fast.data.occupancy.store import Scene
from mfd_fast.npz import read_arrays

CLASSES = (
    "others",
    "barrier",
    "bicycle",
    "bus",
    "car",
    "construction vehicle",
    "motorcycle",
    "pedestrian",
    "traffic cone",
    "trailer",
    "truck",
    "driveable surface",
    "other flat",
    "sidewalk",
    "terrain",
    "manmade",
    "vegetation",
)
"""What a voxel can be filled with: labels 0 to 16."""
FREE = len(CLASSES)
"""The label of an empty voxel."""


class GroundTruth(Protocol):
    """The recorded occupancy of frames."""

    def labels(self, first: int, count: int) -> Tensor:
        """Frames ``first`` to ``first + count - 1``: uint8 ``[count, X, Y, Z]``, 0 to `FREE`."""
        ...


@dataclass(frozen=True, eq=False)
class LabelsInMemory:
    """`GroundTruth` held as a tensor."""

    grids: Tensor
    """uint8 ``[M, X, Y, Z]``."""

    def labels(self, first: int, count: int) -> Tensor:
        """See `GroundTruth`."""
        return self.grids[first : first + count]


class LabelFiles:
    """`GroundTruth` in files ``FOLDER/SCENE/TOKEN/labels.npz``.

    Raises NotADirectoryError when there is no such folder, and FileNotFoundError when files of ``scenes`` are missing.
    """

    def __init__(self, folder: Path, scenes: Sequence[Scene]) -> None:
        if not folder.is_dir():
            raise NotADirectoryError(f"labels: expected the folder that holds SCENE/TOKEN/labels.npz, got {folder}")
        self._paths = label_paths(folder, scenes)
        # Now, not when an evaluation that has run for an hour comes to the first of them.
        missing = [path for path in self._paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"labels: {len(missing)} of {len(self._paths)} files are missing in {folder}, the first is {missing[0]}"
            )

    def labels(self, first: int, count: int) -> Tensor:
        """See `GroundTruth`; ValueError names a file that is damaged."""
        return torch.stack([read_labels(path) for path in self._paths[first : first + count]])


def label_paths(folder: Path, scenes: Sequence[Scene]) -> list[Path]:
    """Where the grids of all frames of ``scenes`` lie in ``folder``, in order."""
    return [folder / scene.name / token / "labels.npz" for scene in scenes for token in scene.tokens]


def read_labels(path: Path) -> Tensor:
    """The grid ``semantics`` of an Occ3D ``labels.npz``, uint8 ``[X, Y, Z]``; ValueError for a file of another kind."""
    if not path.is_file():
        raise FileNotFoundError(f"labels: there is no file {path}")
    content = read_arrays(path)
    if "semantics" not in content:
        raise ValueError(f"{path} holds no 'semantics', it holds {', '.join(content) or 'nothing'}")
    grid = content["semantics"]
    if grid.ndim != 3 or grid.dtype != np.uint8 or grid.max(initial=0) > FREE:
        raise ValueError(
            f"{path}: expected semantics uint8 [X, Y, Z] from 0 to {FREE}, got {grid.dtype} {list(grid.shape)} up to "
            f"{grid.max(initial=0)}"
        )
    return torch.from_numpy(grid)
