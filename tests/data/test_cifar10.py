"""CIFAR-10 in both public formats, whole and damaged."""

import io
import logging
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mfd_fast.data import Dataset, load_dataset
from mfd_fast.data.cifar10 import ROWS_PER_FILE

NAMES = [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]
ROW = 3073


def _pixels(index: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(index).integers(0, 256, (2, 3072), dtype=np.uint8)


def _labels(index: int) -> list[int]:
    return [index, 9 - index]


def _binary(index: int) -> bytes:
    rows = zip(_labels(index), _pixels(index), strict=True)
    return b"".join(bytes([label]) + pixels.tobytes() for label, pixels in rows)


def _python(index: int, **changes: Any) -> bytes:
    batch = {b"data": _pixels(index), b"labels": _labels(index), b"batch_label": b"made up", b"filenames": [b"a", b"b"]}
    batch |= {name.encode(): value for name, value in changes.items()}
    return pickle.dumps(batch, protocol=2)


def _write(folder: Path, binary: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(NAMES):
        (folder / (f"{name}.bin" if binary else name)).write_bytes(_binary(index) if binary else _python(index))
    return folder


def _pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as members:
        members.add(folder, arcname=folder.name)
    return archive


def _flat_binary(root: Path) -> Path:
    return _write(root, binary=True)


def _flat_python(root: Path) -> Path:
    return _write(root, binary=False)


def _nested_binary(root: Path) -> Path:
    _write(root / "cifar-10-batches-bin", binary=True)
    return root


def _nested_python(root: Path) -> Path:
    _write(root / "cifar-10-batches-py", binary=False)
    return root


def _binary_archive(root: Path) -> Path:
    return _pack(_write(root / "files" / "cifar-10-batches-bin", binary=True), root / "archive.tar.gz")


def _folder_with_python_archive(root: Path) -> Path:
    _pack(_write(root / "files" / "cifar-10-batches-py", binary=False), root / "cifar-10-python.tar.gz")
    return root


def _check_content(dataset: Dataset) -> None:
    expected = torch.from_numpy(np.concatenate([_pixels(index) for index in range(5)])).view(-1, 3, 32, 32)
    torch.testing.assert_close(dataset.x, expected.float() / 127.5 - 1, rtol=0, atol=1e-6)
    assert dataset.label is not None
    assert dataset.label.tolist() == [label for index in range(5) for label in _labels(index)]
    torch.testing.assert_close(dataset.held_out_x[0, 0, 0, 0].item(), _pixels(5)[0, 0] / 127.5 - 1, rtol=0, atol=1e-6)
    assert dataset.held_out_label is not None
    assert dataset.held_out_label.tolist() == _labels(5)


@pytest.mark.parametrize(
    "layout",
    [_flat_binary, _flat_python, _nested_binary, _nested_python, _binary_archive, _folder_with_python_archive],
    ids=lambda layout: layout.__name__.strip("_"),
)
def test_reads_every_layout(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    dataset = load_dataset("cifar10", layout(tmp_path))
    assert dataset.name == "cifar10"
    assert dataset.num_classes == 10
    assert dataset.value_range == (-1.0, 1.0)
    _check_content(dataset)


def test_reads_nothing_outside_an_archive(tmp_path: Path) -> None:
    folder = _write(tmp_path / "cifar-10-batches-bin", binary=True)
    outside = tmp_path / "outside.bin"
    (folder / "test_batch.bin").rename(outside)
    (folder / "test_batch.bin").symlink_to(outside)
    archive = _pack(folder, tmp_path / "archive.tar.gz")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileNotFoundError, match="lacks test_batch"):
        load_dataset("cifar10", archive)
    assert sorted(tmp_path.rglob("*")) == before


def test_unconditional(tmp_path: Path) -> None:
    dataset = load_dataset("cifar10", _flat_binary(tmp_path), conditional=False)
    assert dataset.label is None
    assert dataset.held_out_label is None
    assert dataset.num_classes is None


def test_says_how_many_pictures_a_small_file_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_dataset("cifar10", _flat_binary(tmp_path))
    assert "data_batch_1.bin holds 2 pictures, the public file has 10000" in caplog.text


def test_array_in_column_order(tmp_path: Path) -> None:
    folder = _flat_python(tmp_path)
    (folder / "data_batch_1").write_bytes(_python(0, data=np.asfortranarray(_pixels(0))))
    _check_content(load_dataset("cifar10", folder))


def test_text_of_python_2(tmp_path: Path) -> None:
    """The public files were written by Python 2: names and array content are byte strings there."""
    size = len(_pixels(0).tobytes())
    stored = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(K\x02M\x00\x0ctcnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + size.to_bytes(4, "little") + _pixels(0).tobytes() + b"tbU\x06labels](K\x00K\x09eu."
    )
    folder = _flat_python(tmp_path)
    (folder / "data_batch_1").write_bytes(stored)
    _check_content(load_dataset("cifar10", folder))


def test_without_root() -> None:
    with pytest.raises(ValueError, match="root: dataset 'cifar10' is read from a local copy"):
        load_dataset("cifar10")


def test_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_dataset("cifar10", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected data_batch_1\.bin or data_batch_1"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("layout", [_flat_binary, _flat_python], ids=["binary", "python"])
def test_missing_file(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = layout(tmp_path)
    for path in folder.glob("data_batch_3*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="lacks data_batch_3"):
        load_dataset("cifar10", folder)


@pytest.mark.parametrize("size", [0, ROW - 1, 2 * ROW + 1, (ROWS_PER_FILE + 1) * ROW])
def test_binary_file_of_the_wrong_size(size: int, tmp_path: Path) -> None:
    folder = _flat_binary(tmp_path)
    with (folder / "data_batch_2.bin").open("wb") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match=rf"data_batch_2\.bin: expected .*30730000 bytes.*, got {size}$"):
        load_dataset("cifar10", folder)


def test_python_file_that_is_too_large(tmp_path: Path) -> None:
    folder = _flat_python(tmp_path)
    with (folder / "data_batch_2").open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(ValueError, match="data_batch_2: expected at most 61460000 bytes, got 100000000"):
        load_dataset("cifar10", folder)


def test_label_out_of_range(tmp_path: Path) -> None:
    folder = _flat_binary(tmp_path)
    (folder / "test_batch.bin").write_bytes(b"\x0a" + b"\x00" * 3072)
    with pytest.raises(ValueError, match=r"test_batch\.bin: expected labels in \[0, 10\), got 10 to 10"):
        load_dataset("cifar10", folder)


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_malicious_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    folder, mark = _flat_python(tmp_path / "files"), tmp_path / "executed"
    content = _python(0, labels=_Malicious(mark))
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match=r"data_batch_1 .*asks for (posix|nt)\.system, which is refused"):
        load_dataset("cifar10", folder)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_python(0)[:-1000], "data_batch_1 .*: not a readable pickle of arrays"),
        (pickle.dumps([1, 2], protocol=2), "expected a dictionary, got list"),
        (_python(0, data=b"bytes"), "expected a numpy array under 'data', got bytes"),
        (_python(0, data=_pixels(0).astype(np.int64)), "expected an array of uint8"),
        (_python(0, data=_pixels(0)[:, :100]), r"expected an array of shape \(N, 3072\) under 'data', got \(2, 100\)"),
        (_python(0, labels=[1]), "expected as many labels as pictures, got 1 and 2"),
        (_python(0, labels=["1", "2"]), "expected a list of whole numbers"),
        (_python(0, labels=[3, -1]), r"expected labels in \[0, 10\), got -1 to 3"),
        (pickle.dumps({b"data": _pixels(0)}, protocol=2), "expected a list of whole numbers under 'labels'"),
        (b"\x80\x02}(U\x04datacnumpy\nndarray\n(K\x02tRu.", "numpy.ndarray is not called"),
        (b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.", "only latin1 text"),
        (b"\x80\x02cnumpy\ndtype\n}U\x01aK\x01sb.", "only an array or its type has a state"),
        (
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n)RU\x06labels]u.",
            "an array has no content",
        ),
        (
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n)R(K\x01J\xff\xff\xff\x7fM\x00\x0c\x86"
            b"cnumpy\ndtype\nU\x02u1\x85R\x89U\x01atbU\x06labels]u.",
            "expected 6597069763584 bytes for an array of shape .*, got 1 bytes",
        ),
    ],
    ids=[
        "truncated",
        "list",
        "no-array",
        "dtype",
        "shape",
        "few-labels",
        "text-labels",
        "negative-label",
        "no-labels",
        "called-class",
        "encoding",
        "function-state",
        "no-state",
        "huge-shape",
    ],
)
def test_broken_python_batch(content: bytes, message: str, tmp_path: Path) -> None:
    folder = _flat_python(tmp_path)
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_dataset("cifar10", folder)


def test_broken_archive(tmp_path: Path) -> None:
    archive = _binary_archive(tmp_path)
    content = archive.read_bytes()
    for broken in (b"no archive", content[: len(content) // 2], content[:-8] + b"\xff" * 4 + content[-4:]):
        archive.write_bytes(broken)
        with pytest.raises(ValueError, match=r"is not a readable \.tar\.gz"):
            load_dataset("cifar10", archive)


def test_archive_with_a_batch_twice(tmp_path: Path) -> None:
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as members:
        for folder in ("a", "b"):
            member = tarfile.TarInfo(f"{folder}/data_batch_1.bin")
            member.size = 2 * ROW
            members.addfile(member, io.BytesIO(_binary(0)))
    with pytest.raises(ValueError, match="holds data_batch_1 more than once"):
        load_dataset("cifar10", archive)
