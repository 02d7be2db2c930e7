"""A fixed codec between occupancy grids and latents, for the toy set: what OccFM's trained compressor is for nuScenes.

One cell of a latent stands for 2 x 2 columns of 4 voxels. A cell is empty (a latent of zeros) or holds a thing of some
kind, which fills its columns from the ground up to the height of that kind. Channels 0 to 2 are a point on a sphere of
radius 0.1 where there is something (times OccFM's ``RESCALE_FACTOR`` of 10, the unit sphere); its direction is free to
say something that the grid does not show. Channel 3 says which kind.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast.data.occupancy.labels import CLASSES, FREE

COLUMNS, HEIGHT = 2, 4
"""Columns along each side of a cell, and voxels in a column."""
RADIUS = 0.1
CHANNELS = 4


class Kind(NamedTuple):
    """A kind of thing."""

    label: int
    height: int
    """Voxels from the ground up."""
    code: int
    """Channel 3, over `RADIUS`."""


KINDS = (
    Kind(CLASSES.index("car"), 2, 1),
    Kind(CLASSES.index("truck"), 3, -1),
    Kind(CLASSES.index("manmade"), 4, 0),
)
EMPTY = len(KINDS)
"""The number of an empty cell, after those of `KINDS`."""


def encode(cells: Tensor, directions: Tensor) -> Tensor:
    """Latents ``[..., 4, H, W]`` float32 of cells ``[..., H, W]``, numbers of `KINDS` or `EMPTY`.

    ``directions`` ``[..., H, W, 3]`` are unit vectors; those of empty cells are not looked at.
    """
    codes = torch.tensor([*(kind.code for kind in KINDS), 0], dtype=torch.float32)[cells]
    points = torch.where((cells != EMPTY)[..., None], directions, 0.0)
    return RADIUS * torch.stack([*points.unbind(-1), codes], dim=-3).float()


def decode(latents: Tensor) -> Tensor:
    """Grids ``[..., 2H, 2W, 4]`` uint8 of latents ``[..., 4, H, W]``.

    There is something where channels 0 to 2 reach half the radius, of the kind whose code is nearest to channel 3.
    """
    codes = torch.tensor([kind.code for kind in KINDS], dtype=latents.dtype, device=latents.device)
    kind = (latents[..., 3, :, :, None] / RADIUS - codes).abs().argmin(dim=-1)
    held = latents[..., :3, :, :].norm(dim=-3) >= RADIUS / 2
    return columns_of(torch.where(held, kind, EMPTY))


def columns_of(cells: Tensor) -> Tensor:
    """Grids ``[..., 2H, 2W, 4]`` uint8 of cells ``[..., H, W]``: numbers of `KINDS`, or `EMPTY`."""
    columns = torch.full((len(KINDS) + 1, HEIGHT), FREE, dtype=torch.uint8)
    for number, kind in enumerate(KINDS):
        columns[number, : kind.height] = kind.label
    grid = columns.to(cells.device)[cells]
    return grid.repeat_interleave(COLUMNS, dim=-3).repeat_interleave(COLUMNS, dim=-2)
