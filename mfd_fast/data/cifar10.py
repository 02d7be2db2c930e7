"""CIFAR-10 from a local copy of one of its two public formats. Nothing is downloaded and no pickle is executed."""

import gzip
import logging
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mfd_fast.data.dataset import Dataset
from mfd_fast.data.pickled_batch import read_pickled_batch

logger = logging.getLogger(__name__)

SAMPLE_SHAPE = (3, 32, 32)
SAMPLE_SIZE = 3 * 32 * 32
ROW_SIZE = 1 + SAMPLE_SIZE
ROWS_PER_FILE = 10_000
NUM_CLASSES = 10

_TRAINING = tuple(f"data_batch_{index}" for index in range(1, 6))
_BINARY = tuple(f"{name}.bin" for name in (*_TRAINING, "test_batch"))
_PYTHON = (*_TRAINING, "test_batch")
_FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
_ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
# A python batch also carries the name of every picture: 31 MB where the binary one has 30.73 MB.
_LARGEST = {True: ROWS_PER_FILE * ROW_SIZE, False: 2 * ROWS_PER_FILE * ROW_SIZE}

_CHUNK = 1 << 20

_Batch = tuple[Tensor, Tensor]
"""Pixels ``[N, 3, 32, 32]`` uint8 and labels ``[N]`` int64."""


def cifar10(root: Path | None = None, conditional: bool = True) -> Dataset:
    """CIFAR-10 in [-1, 1], ``[N, 3, 32, 32]``; its test batch is held out. Without ``conditional`` it has no labels.

    ``root`` is a folder with the five training batches and the test batch, in the binary or the python format; or
    the folder around ``cifar-10-batches-bin``, ``cifar-10-batches-py`` or one of the two public ``.tar.gz`` archives;
    or such an archive, which is read without being unpacked. Batches may hold fewer than the public 10000 pictures;
    a log line then says so. Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

    Raises ValueError without a root or for a damaged file, FileNotFoundError for a missing one.
    """
    if root is None:
        raise ValueError(
            "root: dataset 'cifar10' is read from a local copy: give its folder (--set data.root=FOLDER), got None"
        )
    batches = _read_batches(Path(root))
    training = [batches[name] for name in _TRAINING]
    held_out = batches["test_batch"]
    return Dataset(
        name="cifar10",
        x=_scale(torch.cat([pixels for pixels, _ in training])),
        label=torch.cat([label for _, label in training]) if conditional else None,
        held_out_x=_scale(held_out[0]),
        held_out_label=held_out[1] if conditional else None,
        num_classes=NUM_CLASSES if conditional else None,
        value_range=(-1.0, 1.0),
    )


def _scale(pixels: Tensor) -> Tensor:
    return pixels.to(torch.float32).div_(127.5).sub_(1)


def _read_batches(root: Path) -> dict[str, _Batch]:
    """Every batch that is needed, by its name without suffix."""
    source = _locate(root)
    files = _archive_files(source) if source.is_file() else _folder_files(source)
    batches: dict[str, _Batch] = {}
    for path, content in files:
        name = Path(path).name.removesuffix(".bin")
        if name in batches:
            raise ValueError(f"root: {source.name} holds {name} more than once")
        batches[name] = _decode(path, content)
    missing = [name for name in _PYTHON if name not in batches]
    if missing:
        raise FileNotFoundError(f"root: {source} lacks {', '.join(missing)}")
    return batches


def _locate(root: Path) -> Path:
    """The folder or archive that holds the batches."""
    if not root.exists():
        raise FileNotFoundError(f"root: expected a local copy of CIFAR-10, {root} does not exist")
    if root.is_file():
        return root
    if any((root / name).is_file() for name in (*_BINARY, *_PYTHON)):
        return root
    for name in (*_FOLDERS, *_ARCHIVES):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(
        f"root: expected data_batch_1.bin or data_batch_1, or one of {', '.join((*_FOLDERS, *_ARCHIVES))} in {root}"
    )


def _folder_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The path and content of every batch in a folder: the binary format where it is present, else the python one."""
    names = _BINARY if any((folder / name).is_file() for name in _BINARY) else _PYTHON
    for name in names:
        path = folder / name
        if path.is_file():
            _check_size(str(path), path.stat().st_size)
            yield str(path), path.read_bytes()


def _archive_files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The name and content of every batch in a ``.tar.gz``; anything that is not a regular file is passed over."""
    try:
        with gzip.open(archive) as content, tarfile.open(fileobj=content, mode="r:") as members:
            for member in members:
                if Path(member.name).name not in (*_BINARY, *_PYTHON) or not member.isfile():
                    continue
                _check_size(member.name, member.size)
                stream = members.extractfile(member)
                yield member.name, b"" if stream is None else stream.read()
            while content.read(_CHUNK):
                pass  # the checksum is compared at the very end
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"root: {archive} is not a readable .tar.gz: {error}") from error


def _check_size(path: str, size: int) -> None:
    """Refuse a file by its size, before it is read."""
    binary = path.endswith(".bin")
    if size > _LARGEST[binary]:
        raise ValueError(f"{path}: expected at most {_LARGEST[binary]} bytes, got {size}")
    if binary and (size == 0 or size % ROW_SIZE):
        raise ValueError(
            f"{path}: expected {ROWS_PER_FILE * ROW_SIZE} bytes or another multiple of {ROW_SIZE} above 0, got {size}"
        )


def _decode(path: str, content: bytes) -> _Batch:
    if path.endswith(".bin"):
        rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, ROW_SIZE)
        pixels, label = rows[:, 1:], rows[:, 0].to(torch.int64)
    else:
        try:
            pixels, labels = read_pickled_batch(content, SAMPLE_SIZE)
        except ValueError as error:
            raise ValueError(f"{path} ({len(content)} bytes): {error}") from error
        label = torch.tensor(labels, dtype=torch.int64)
    if len(pixels) == 0 or len(label) != len(pixels):
        raise ValueError(f"{path}: expected as many labels as pictures, got {len(label)} and {len(pixels)}")
    if int(label.min()) < 0 or int(label.max()) >= NUM_CLASSES:
        raise ValueError(f"{path}: expected labels in [0, {NUM_CLASSES}), got {int(label.min())} to {int(label.max())}")
    if len(pixels) != ROWS_PER_FILE:
        logger.warning("%s holds %d pictures, the public file has %d", path, len(pixels), ROWS_PER_FILE)
    return pixels.reshape(-1, *SAMPLE_SHAPE), label
