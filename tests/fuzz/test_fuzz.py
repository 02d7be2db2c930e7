"""A short fuzzing of every parser, and everything that ever broke one; `make fuzz` is the long version."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz import CORPUS, check, fuzz
from parsers import PARSERS

from mfd_fast.data.pickled_batch import read_pickled_batch
from mfd_fast.npz import read_arrays


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", PARSERS)
def test_spoilt_inputs_are_read_or_refused(name: str) -> None:
    assert fuzz(name, seconds=20.0, seed=7, most=60) > 0


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_broke_a_parser(path: Path) -> None:
    check(path.parent.name, path.read_bytes())


PICKLES = {
    "a memory of four billion places": (b"\x80\x02}r\xff\xff\xff\x7f.", "expected a numpy array"),
    "a call": (b"\x80\x02cos\nsystem\nU\x04echo\x85R.", "asks for os.system, which is refused"),
    "a call by two texts": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04echo\x85R.", "os.system, which is refused"),
    "an object": (b"\x80\x02cnumpy\ndtype\n)\x81.", "the instruction NEWOBJ has no place"),
    "a file from elsewhere": (b"\x80\x02P1\n.", "the instruction PERSID has no place"),
    "a length beyond the end": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "not a readable pickle of arrays"),
    "a copied value": (b"\x80\x02]2.", "the instruction DUP has no place"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_that_wants_more_than_a_batch_does(case: str) -> None:
    content, words = PICKLES[case]
    with pytest.raises(ValueError, match=words):
        read_pickled_batch(content, 12)


def test_laughing_tuples_cost_nothing() -> None:
    """Forty tuples, each of the one before twice: shown or hashed that would take for ever."""
    content = b"\x80\x02)" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(40)) + b"."
    with pytest.raises(ValueError, match=r"has no place|expected a dictionary, got tuple"):
        read_pickled_batch(content, 12)
    shape = b"".join(b"q%ch%c\x86" % (i, i) for i in range(1, 41))
    batch = b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01)" + shape
    batch += b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR\x89U\x00tbU\x06labels]u."
    with pytest.raises(ValueError, match="an array has no shape of whole numbers"):
        read_pickled_batch(batch, 12)


def test_an_array_larger_than_its_file_is_refused_before_it_is_made(tmp_path: Path) -> None:
    import io
    import zipfile

    import numpy as np

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + b"1234")
    with pytest.raises(ValueError, match=r"its shape needs 4000000000000 bytes, there are"):
        read_arrays(tmp_path / "a.npz")


def test_an_archive_that_unfolds_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    import numpy as np

    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(1_000_000))
    assert (tmp_path / "a.npz").stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"holds 8000128 bytes, the most allowed is 1000000"):
        read_arrays(tmp_path / "a.npz", most_bytes=1_000_000)
    assert read_arrays(tmp_path / "a.npz")["x"].shape == (1_000_000,)


@pytest.mark.parametrize("kind", ["object", "text", "time"])
def test_arrays_of_anything_but_numbers_are_refused(kind: str, tmp_path: Path) -> None:
    import numpy as np

    values = {"object": np.array([{}], dtype=object), "text": np.array(["a"]), "time": np.array(["2020"], "M8[D]")}
    np.savez(tmp_path / "a.npz", x=values[kind])
    with pytest.raises(ValueError, match=r"expected numbers"):
        read_arrays(tmp_path / "a.npz")
