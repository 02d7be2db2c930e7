"""A fixed codec between occupancy grids and latents, for the toy set: what OccFM's trained compressor is for nuScenes.

One cell of a latent stands for 2 x 2 columns of 4 voxels. A cell holds nothing, or one kind of thing, which fills its
columns from the ground up to the height of that kind. Channel 0 says whether there is something, channels 1 to 3 which
kind: 0.1 for yes, -0.1 for no (times OccFM's ``RESCALE_FACTOR`` of 10, plus and minus one).
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


KINDS = (Kind(CLASSES.index("car"), 2), Kind(CLASSES.index("truck"), 3), Kind(CLASSES.index("manmade"), 4))


def encode(labels: Tensor) -> Tensor:
    """Latents ``[..., 4, H, W]`` float32 of grids ``[..., 2H, 2W, 4]``, by the ground voxel of every first column."""
    ground = labels[..., ::COLUMNS, ::COLUMNS, 0]
    kinds = torch.stack([ground == kind.label for kind in KINDS], dim=-3)
    held = torch.cat([kinds.any(dim=-3, keepdim=True), kinds], dim=-3)
    return AMPLITUDE * (2 * held.float() - 1)


def decode(latents: Tensor) -> Tensor:
    """Grids ``[..., 2H, 2W, 4]`` uint8 of latents ``[..., 4, H, W]``: the likelier of something and nothing, then the
    likeliest kind.
    """
    return columns_of(torch.where(latents[..., 0, :, :] > 0, latents[..., 1:, :, :].argmax(dim=-3), len(KINDS)))


def columns_of(kind: Tensor) -> Tensor:
    """Grids ``[..., 2H, 2W, 4]`` uint8 of cells ``[..., H, W]``: a number of `KINDS`, or their count for nothing."""
    columns = torch.full((len(KINDS) + 1, HEIGHT), FREE, dtype=torch.uint8)
    for number, (label, height) in enumerate(KINDS):
        columns[number, :height] = label
    grid = columns.to(kind.device)[kind]
    return grid.repeat_interleave(COLUMNS, dim=-3).repeat_interleave(COLUMNS, dim=-2)
