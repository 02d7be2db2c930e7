"""Encoded prompts on disk: shards of token embeddings without their padding, an index, and rows read on demand.

A shard holds the tokens of its prompts one after the other: ``embeds`` ``[tokens, C]``, ``mask`` ``[tokens]`` uint8
(1 = attend), and ``ends`` ``[rows]`` int64, where each prompt ends. ``negative.safetensors`` is a shard with one row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mfd_fast.storage import check_count, check_name, read_json, sha256, write_json, write_tensors

INDEX = "index.json"
FORMAT = 1
NEGATIVE = "negative.safetensors"


@dataclass(frozen=True)
class Shard:
    """One file of the index."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class PromptIndex:
    """What ``index.json`` says."""

    prompts: int
    """Rows in all shards."""
    width: int
    """C of the embeddings."""
    longest: int
    """Tokens of the longest prompt, the negative one included."""
    shards: tuple[Shard, ...]
    negative: Shard
    source: Mapping[str, Any] = field(default_factory=dict)
    """The prompt file: ``name``, ``sha256``, ``broken`` lines."""
    encoder: Mapping[str, Any] = field(default_factory=dict)
    """What encoded: hash of its configuration, instruction, tokens, type."""
    sample_shape: tuple[int, ...] | None = None
    """Of the pipeline's latents, where the pipeline says."""


def write_index(folder: Path, index: PromptIndex) -> None:
    """Write ``index.json``; from then on the folder is whole."""
    write_json(folder / INDEX, {"format": FORMAT, **asdict(index)})


def read_index(path: Path) -> PromptIndex:
    """Read an ``index.json``; ValueError says what is wrong with it."""
    value = read_json(path)
    try:
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']!r}, this version reads {FORMAT}")
        shape = value["sample_shape"]
        index = PromptIndex(
            _count(value, "prompts"),
            _count(value, "width"),
            _count(value, "longest"),
            tuple(_shard(entry) for entry in value["shards"]),
            _shard(value["negative"]),
            dict(value["source"]),
            dict(value["encoder"]),
            None if shape is None else tuple(check_count(side, "sample_shape") for side in shape),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an index of encoded prompts: {error}") from error
    if sum(shard.rows for shard in index.shards) != index.prompts or index.negative.rows != 1:
        raise ValueError(f"{path} is not an index of encoded prompts: its rows do not add up")
    return index


def _shard(entry: Any) -> Shard:
    if not isinstance(entry["sha256"], str):
        raise ValueError(f"a digest must be a text, got {entry['sha256']!r}")
    return Shard(check_name(entry["file"], "a shard"), _count(entry, "rows"), entry["sha256"])


def _count(value: Any, name: str) -> int:
    return check_count(value[name], name)


def pack(embeds: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The tensors of a shard from ``embeds`` ``[n, L, C]`` and ``mask`` ``[n, L]``, without padding at the ends.

    Raises:
        ValueError: a prompt without a single token to attend to.
    """
    used = mask != 0
    if not bool(used.any(1).all()):
        raise ValueError(f"prompt {int((~used.any(1)).nonzero()[0])} has no token to attend to")
    lengths = (used * torch.arange(1, used.shape[1] + 1)).amax(1)
    kept = torch.arange(used.shape[1]) < lengths[:, None]
    return {"embeds": embeds[kept], "mask": used[kept].to(torch.uint8), "ends": lengths.cumsum(0)}


def write_shard(folder: Path, file: str, tensors: Mapping[str, Tensor]) -> Shard:
    """Write a shard whole or not at all."""
    write_tensors(folder / file, tensors)
    return Shard(file, len(tensors["ends"]), sha256(folder / file))


class ShardReader:
    """One shard, of which only the rows that are asked for are read."""

    def __init__(self, path: Path, width: int) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = cast(Any, safe_open(path, framework="pt"))
            self._embeds, self._mask = self._file.get_slice("embeds"), self._file.get_slice("mask")
            self.ends: Tensor = self._file.get_tensor("ends")
            shape, marks = self._embeds.get_shape(), self._mask.get_shape()
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing") from error
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is not a shard of encoded prompts: {error}") from error
        lengths = self.ends.diff(prepend=torch.zeros(1, dtype=torch.int64)) if self.ends.dtype == torch.int64 else None
        if lengths is None or self.ends.dim() != 1 or not len(lengths) or int(lengths.min()) < 1:
            raise ValueError(f"{path} is not a shard of encoded prompts: the ends of its rows are damaged")
        if shape != [int(self.ends[-1]), width] or marks != shape[:1]:
            raise ValueError(f"{path} is not a shard of encoded prompts: {shape} embeddings, {marks} marks")

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """``embeds`` ``[l, C]`` and ``mask`` ``[l]`` of a row."""
        first, last = int(self.ends[row - 1]) if row else 0, int(self.ends[row])
        return self._embeds[first:last], self._mask[first:last]


class PromptStore:
    """The encoded prompts of a folder; shards are opened when a row of theirs is read first.

    Raises:
        FileNotFoundError: the folder has no index: nothing is encoded there, or not all.
        ValueError: damaged files.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"{folder} holds no encoded prompts ({INDEX}): run mfd-fast encode-prompts")
        self.folder = folder
        self.index = read_index(folder / INDEX)
        self._readers: dict[str, ShardReader] = {}
        self._last = torch.tensor([shard.rows for shard in self.index.shards]).cumsum(0)

    def row(self, row: int) -> tuple[Tensor, Tensor]:
        """``embeds`` ``[l, C]`` and ``mask`` ``[l]`` of a prompt."""
        number = int(torch.searchsorted(self._last, row, right=True))
        shard = self.index.shards[number]
        return self._reader(shard).read(row - int(self._last[number]) + shard.rows)

    def negative(self) -> dict[str, Tensor]:
        """The condition that guidance pushes away from, one row."""
        embeds, mask = self._reader(self.index.negative).read(0)
        return pad([(embeds, mask)], self.index.longest)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of the embeddings."""
        return self._reader(self.index.negative).read(0)[0].dtype

    @property
    def digests(self) -> dict[Path, str]:
        """The SHA-256 digest that the index gives for each file."""
        return {self.folder / shard.file: shard.sha256 for shard in (*self.index.shards, self.index.negative)}

    def _reader(self, shard: Shard) -> ShardReader:
        reader = self._readers.get(shard.file)
        if reader is None:
            reader = ShardReader(self.folder / shard.file, self.index.width)
            if len(reader.ends) != shard.rows:
                raise ValueError(f"{self.folder / shard.file} has {len(reader.ends)} rows, the index says {shard.rows}")
            self._readers[shard.file] = reader
        return reader


def pad(rows: Sequence[tuple[Tensor, Tensor]], length: int) -> dict[str, Tensor]:
    """``prompt_embeds`` ``[n, length, C]`` and ``prompt_mask`` ``[n, length]`` bool of rows, zeros after their ends."""
    head = rows[0][0]
    embeds = torch.zeros(len(rows), length, head.shape[1], dtype=head.dtype)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, (tokens, marks) in enumerate(rows):
        embeds[index, : len(tokens)] = tokens
        mask[index, : len(marks)] = marks != 0
    return {"prompt_embeds": embeds, "prompt_mask": mask}


@dataclass(frozen=True)
class PromptRows:
    """One part of the conditions, ``prompt_embeds`` or ``prompt_mask``, of the rows ``first`` to ``last - 1``."""

    store: PromptStore
    name: str
    first: int
    last: int

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, L, C)``, or ``(N, L)`` of a mask."""
        index = self.store.index
        width = (index.width,) if self.name == "prompt_embeds" else ()
        return (len(self), index.longest, *width)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers."""
        return self.store.dtype if self.name == "prompt_embeds" else torch.bool

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: Tensor, /) -> Tensor:
        rows = [self.store.row(self.first + row) for row in index.tolist()]
        return pad(rows, self.store.index.longest)[self.name]
