"""Occupancy forecasting: windows of latents, with the frames to come as samples and the past as their condition."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mfd_fast.data.dataset import Dataset
from mfd_fast.data.occupancy import codec, toy
from mfd_fast.data.occupancy.labels import GroundTruth, LabelsInMemory
from mfd_fast.data.occupancy.store import Frames, FramesOnDisk, Scene, Windows, window_starts

Decoder = Callable[[Tensor], Tensor]
"""Occupancy grids uint8 ``[n, X, Y, Z]`` of latents ``[n, C, H, W]`` in the compressor's units."""


@dataclass(frozen=True, eq=False)
class OccupancyDataset(Dataset):
    """A `Dataset` of future frames ``[future, C, H, W]`` with the conditions ``history`` and ``trajectory``."""

    scale: float = 1.0
    """What latents of the compressor were multiplied with."""
    scenes: tuple[Scene, ...] = ()
    """Scenes and frames of the held-out data, whose recorded occupancy may lie in files."""
    truth: GroundTruth | None = None
    """Recorded occupancy of the held-out frames where the data hold it themselves."""
    truth_starts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """First future frame of every held-out sample, int64 ``[M]``."""
    decoder: Decoder | None = None
    """The fixed codec of the toy set."""


def occupancy(
    root: Path | None = None,
    history: int = 6,
    future: int = 6,
    history_last: int = 6,
    rescale: float = 10.0,
    channels: int | None = None,
) -> OccupancyDataset:
    """Latents that ``mfd-fast convert-occfm`` wrote into ``root/training`` and ``root/validation``.

    Args:
        root: that folder.
        history: frames of the past, of which only the last ``history_last`` are shown, the others zero.
        future: frames to come.
        rescale: OccFM's ``RESCALE_FACTOR``.
        channels: that the latents must have; None takes what is there.

    Raises:
        ValueError: no root, other channels, windows that no scene is long enough for, or damaged files.
        FileNotFoundError: a split is missing.
    """
    if root is None:
        raise ValueError("root: dataset 'occupancy' is read from a converted folder; expected it, got None")
    training, held_out = FramesOnDisk(root / "training"), FramesOnDisk(root / "validation")
    if channels is not None and training.latent_shape[0] != channels:
        raise ValueError(f"channels: expected latents of {channels}, those in {root} have {training.latent_shape[0]}")
    return _dataset("occupancy", training, held_out, (history, future, history_last), rescale, None, None)


def occupancy_toy(
    root: Path | None = None,
    history: int = 3,
    future: int = 3,
    history_last: int = 3,
    rescale: float = 10.0,
    seed: int = 0,
    training_scenes: int | None = None,
    validation_scenes: int | None = None,
) -> OccupancyDataset:
    """Moving boxes on a small grid, 4 x 12 x 12 latents with a codec of their own.

    Without ``root`` they are made in memory; with it they are read as `occupancy` reads, from what
    ``mfd-fast make-occupancy-toy`` and ``mfd-fast convert-occfm`` wrote. The other arguments are those of `occupancy`;
    ``seed`` and the numbers of scenes are for what is made in memory.
    """
    lengths = (history, future, history_last)
    if root is not None:
        training, held_out = FramesOnDisk(root / "training"), FramesOnDisk(root / "validation")
        return _dataset("occupancy-toy", training, held_out, lengths, rescale, None, codec.decode)
    made = toy.make_split("training", seed, training_scenes)
    apart = toy.make_split("validation", seed, validation_scenes)
    known = LabelsInMemory(apart.grids)
    return _dataset("occupancy-toy", made.frames, apart.frames, lengths, rescale, known, codec.decode)


def _dataset(
    name: str,
    training: Frames,
    held_out: Frames,
    lengths: tuple[int, int, int],
    rescale: float,
    truth: GroundTruth | None,
    decoder: Decoder | None,
) -> OccupancyDataset:
    history, future, history_last = lengths
    if history < 1 or future < 1 or not 1 <= history_last <= history or not rescale > 0:
        raise ValueError(
            f"history, future and rescale must be positive and history_last from 1 to history, got {history}, "
            f"{future}, {rescale} and {history_last}"
        )
    if training.latent_shape != held_out.latent_shape:
        raise ValueError(f"root: training latents are {training.latent_shape}, validation {held_out.latent_shape}")
    starts = [window_starts(frames.scenes, history + future) for frames in (training, held_out)]
    for split, found in zip(("training", "validation"), starts, strict=True):
        if not len(found):
            raise ValueError(f"root: no {split} scene has the {history + future} frames of a window")
    blank = history - history_last

    def windows(split: int, kind: str, offset: int, length: int) -> Windows:
        scale = rescale if kind == "latents" else 1.0
        return Windows((training, held_out)[split], kind, starts[split], offset, length, blank, scale)

    conditions = [
        {
            "history": windows(split, "latents", 0, history),
            "trajectory": windows(split, "trajectory", 0, history + future),
        }
        for split in (0, 1)
    ]
    return OccupancyDataset(
        name=name,
        x=windows(0, "latents", history, future),
        label=None,
        held_out_x=windows(1, "latents", history, future),
        held_out_label=None,
        conditions=conditions[0],
        held_out_conditions=conditions[1],
        scale=rescale,
        scenes=held_out.scenes,
        truth=truth,
        truth_starts=starts[1] + history,
        decoder=decoder,
    )
