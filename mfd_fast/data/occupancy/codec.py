"""A fixed codec between occupancy grids and latents, for the toy set: what OccFM's trained compressor is for nuScenes.

One cell of a latent stands for 2 x 2 columns of 4 voxels. A cell is empty (a latent of zeros) or holds a thing of some
kind, which fills its columns from the ground up to the height of that kind. Kinds have orthogonal patterns of four
numbers, plus or minus 0.1 (times OccFM's ``RESCALE_FACTOR`` of 10, plus and minus one). A pattern and its negative mean
the same: the sign is free to say something that the grid does not show.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast.data.occupancy.labels import CLASSES, FREE

COLUMNS, HEIGHT = 2, 4
"""Columns along each side of a cell, and voxels in a column."""
AMPLITUDE = 0.1
CHANNELS = 4


class Kind(NamedTuple):
    """A kind of thing."""

    label: int
    height: int
    """Voxels from the ground up."""
    pattern: tuple[int, ...]


KINDS = (
    Kind(CLASSES.index("car"), 2, (1, 1, -1, -1)),
    Kind(CLASSES.index("truck"), 3, (1, -1, 1, -1)),
    Kind(CLASSES.index("manmade"), 4, (1, -1, -1, 1)),
)
EMPTY = len(KINDS)
"""The number of an empty cell, after those of `KINDS`."""


def encode(cells: Tensor, signs: Tensor) -> Tensor:
    """Latents ``[..., 4, H, W]`` float32 of cells ``[..., H, W]`` (numbers of `KINDS`, or `EMPTY`) with signs alike."""
    patterns = torch.tensor([*(kind.pattern for kind in KINDS), (0,) * CHANNELS], dtype=torch.float32)
    return AMPLITUDE * (patterns[cells] * signs[..., None]).movedim(-1, -3)


def decode(latents: Tensor) -> Tensor:
    """Grids ``[..., 2H, 2W, 4]`` uint8 of latents ``[..., 4, H, W]``.

    A cell holds the kind whose pattern it resembles most, whatever the sign, if it does so at least by half.
    """
    patterns = torch.tensor([kind.pattern for kind in KINDS], dtype=latents.dtype, device=latents.device)
    alike = torch.einsum("kc,...chw->...khw", patterns, latents).abs() / (CHANNELS * AMPLITUDE)
    most, kind = alike.max(dim=-3)
    return columns_of(torch.where(most >= 0.5, kind, EMPTY))


def columns_of(cells: Tensor) -> Tensor:
    """Grids ``[..., 2H, 2W, 4]`` uint8 of cells ``[..., H, W]``: numbers of `KINDS`, or `EMPTY`."""
    columns = torch.full((len(KINDS) + 1, HEIGHT), FREE, dtype=torch.uint8)
    for number, kind in enumerate(KINDS):
        columns[number, : kind.height] = kind.label
    grid = columns.to(cells.device)[cells]
    return grid.repeat_interleave(COLUMNS, dim=-3).repeat_interleave(COLUMNS, dim=-2)
