"""Sequences of latents: read from a converted folder as they are needed, or held in memory.

A converted folder holds ``index.json`` and ``frames-NNNN.safetensors`` with ``latents`` ``[n, C, H, W]`` float32 and
``trajectory`` ``[n, 2]`` float32. Every file holds whole scenes, in the order of the index.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mfd_fast.storage import check_count, check_name, read_json

FORMAT, VERSION, INDEX = "mfd_fast occupancy latents", 1, "index.json"
KINDS = ("latents", "trajectory")


class Scene(NamedTuple):
    """Frames that follow each other in time."""

    name: str
    tokens: tuple[str, ...]
    """What OccFM calls its frames."""


class Frames(Protocol):
    """The frames of all scenes, one scene after the other, numbered from 0."""

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The scenes in order."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        ...

    def read(self, kind: str, first: int, count: int) -> Tensor:
        """Frames ``first`` to ``first + count - 1`` of one scene: ``latents`` ``[count, C, H, W]`` or ``trajectory``
        ``[count, 2]`` (how the vehicle moves from each frame to the next, in metres), float32.
        """
        ...


@dataclass(frozen=True, eq=False)
class FramesInMemory:
    """`Frames` held as tensors."""

    scenes: tuple[Scene, ...]
    latents: Tensor
    """``[M, C, H, W]`` float32."""
    trajectory: Tensor
    """``[M, 2]`` float32."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        _, channels, height, width = self.latents.shape
        return channels, height, width

    def read(self, kind: str, first: int, count: int) -> Tensor:
        """See `Frames`."""
        whole = self.latents if kind == "latents" else self.trajectory
        return whole[first : first + count]


class FramesOnDisk:
    """`Frames` of a converted folder; only what is asked for is read.

    Raises:
        FileNotFoundError: the folder has no index.
        ValueError: index and files do not fit each other; the message names the file.
    """

    digests: dict[Path, str]
    """The SHA-256 digest that the index gives for each file."""

    def __init__(self, folder: Path) -> None:
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(
                f"{folder} has no {INDEX}: make it with mfd-fast convert-occfm LATENTS.pkl --infos INFOS.pkl --out "
                f"{folder}"
            )
        index = read_json(folder / INDEX)
        try:
            self._parse(index, folder)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} is not an index of occupancy latents: {error!r} is wrong") from error
        except (ValueError, OSError) as error:
            raise ValueError(f"{folder / INDEX}: {error}") from error
        self._open: dict[int, dict[str, Any]] = {}

    def _parse(self, index: Any, folder: Path) -> None:
        if index["format"] != FORMAT or index["version"] != VERSION:
            raise ValueError(
                f"has format {index['format']!r} version {index['version']}, expected {FORMAT!r} "
                f"version {VERSION}: convert the latents again"
            )
        channels, height, width = (check_count(side, "latent_shape") for side in index["latent_shape"])
        self.latent_shape = (channels, height, width)
        self.scenes = tuple(_scene(scene) for scene in index["scenes"])
        self._files = [folder / check_name(entry["file"], "a file") for entry in index["files"]]
        self.digests = {path: _digest(entry) for path, entry in zip(self._files, index["files"], strict=True)}
        counts = [check_count(entry["frames"], "frames") for entry in index["files"]]
        self._first = [0, *accumulate(counts)]
        for path, entry in zip(self._files, index["files"], strict=True):
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                size = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
                raise ValueError(f"{path} should have {entry['bytes']} bytes, there is {size}: convert again")
        if sum(counts) != sum(len(scene.tokens) for scene in self.scenes):
            raise ValueError(f"lists {sum(counts)} frames in files and another number in scenes")

    def read(self, kind: str, first: int, count: int) -> Tensor:
        """See `Frames`."""
        number = bisect_right(self._first, first) - 1
        begin = first - self._first[number]
        rows = self._file(number)[kind]
        frames = self._first[number + 1] - self._first[number]
        if rows.get_shape() != [frames, *(self.latent_shape if kind == "latents" else (2,))]:
            raise ValueError(f"{self._files[number]} does not hold the {kind} that {INDEX} promises")
        part: Tensor = rows[begin : begin + count]
        if part.dtype != torch.float32:
            raise ValueError(f"{self._files[number]}: expected {kind} in float32, got {part.dtype}")
        return part

    def _file(self, number: int) -> dict[str, Any]:
        """What can be read in parts of one file, by kind."""
        from safetensors import SafetensorError, safe_open

        if number not in self._open:
            try:
                opened: Any = safe_open(self._files[number], "pt")
                self._open[number] = {kind: opened.get_slice(kind) for kind in KINDS}
            except (SafetensorError, OSError, ValueError) as error:
                raise ValueError(f"{self._files[number]} is not a file of frames: {error}") from error
        return self._open[number]


def _digest(entry: Any) -> str:
    if not isinstance(entry["sha256"], str):
        raise ValueError(f"a digest must be a text, got {entry['sha256']!r:.80}")
    digest: str = entry["sha256"]
    return digest


def _scene(entry: Any) -> Scene:
    """A scene whose names are those of folders, as `mfd_fast.data.occupancy.labels` reads them."""
    tokens = tuple(check_name(token, "a token") for token in entry["tokens"])
    return Scene(check_name(entry["name"], "a scene"), tokens)


def window_starts(scenes: Sequence[Scene], length: int) -> Tensor:
    """Every frame from which ``length`` frames of one scene follow each other, int64 ``[N]``."""
    starts: list[int] = []
    first = 0
    for scene in scenes:
        starts += range(first, first + len(scene.tokens) - length + 1)
        first += len(scene.tokens)
    return torch.tensor(starts, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Windows:
    """Parts of windows as rows (`mfd_fast.types.Rows`): frames ``offset`` to ``offset + length - 1`` of each.

    The first ``blank`` frames of every window are zero, whatever was recorded: OccFM's ``HIST_LAST`` shortens the
    history that way without changing its shape.
    """

    frames: Frames
    kind: str
    starts: Tensor
    """First frame of each window, int64 ``[N]``."""
    offset: int
    length: int
    blank: int = 0
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, length, ...)``."""
        return (len(self.starts), self.length, *(self.frames.latent_shape if self.kind == "latents" else (2,)))

    @property
    def dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Tensor, /) -> Tensor:
        rows = torch.stack(
            [self.frames.read(self.kind, start + self.offset, self.length) for start in self.starts[index].tolist()]
        )
        rows = rows * self.scale
        rows[:, : max(0, self.blank - self.offset)] = 0
        return rows
