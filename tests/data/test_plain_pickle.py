"""Pickles of arrays read without running anything: what comes through, and what is refused unexecuted."""

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfd_fast.data.plain_pickle import read_plain_pickle


def read(content: bytes) -> Any:
    return read_plain_pickle(io.BytesIO(content))


VALUES = {
    "floats": np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4),
    "columns": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "half": np.array([1.5, -2.0], dtype=np.float16),
    "big-endian": np.arange(5, dtype=">i4"),
    "bools": np.array([[True, False]]),
    "texts": np.array(["car", "truck"]),
    "bytes": np.array([b"ab", b"c"]),
    "empty": np.zeros((0, 3), dtype=np.uint8),
    "no-dimension": np.array(3.0),
    "strided": np.arange(10)[::2],
}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", VALUES)
def test_arrays_come_back(name: str, protocol: int) -> None:
    got = read(pickle.dumps({"x": [VALUES[name]]}, protocol=protocol))["x"][0]
    assert isinstance(got, np.ndarray)
    assert got.dtype == VALUES[name].dtype
    np.testing.assert_array_equal(got, VALUES[name])


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_containers_and_scalars_come_back(protocol: int) -> None:
    shared = [1, 2]
    value = {
        "a": (1, 2.5, None, True, "text", b"bytes"),
        "b": [shared, shared],
        "c": {"d": {1, 2}},
        "n": [np.float64(1.5), np.int32(3), np.bool_(True)],
        "o": np.array([{"x": np.arange(2)}, None], dtype=object),
    }
    got = read(pickle.dumps(value, protocol=protocol))
    assert got["a"] == value["a"]
    assert got["b"][0] is got["b"][1]
    assert got["c"] == {"d": {1, 2}}
    assert got["n"] == [1.5, 3, True]
    assert [type(item) for item in got["n"]] == [float, int, bool]
    assert got["o"][1] is None
    np.testing.assert_array_equal(got["o"][0]["x"], [0, 1])


class _Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.content = function, arguments

    def __reduce__(self) -> Any:
        return self.content


@pytest.mark.parametrize("depth", ["top", "in-a-list", "in-an-array", "as-a-key"])
def test_nothing_is_run(depth: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    attack: Any = _Runs(os.mkdir, str(mark))
    hidden = {"top": attack, "in-a-list": [1, attack], "as-a-key": {attack: 1}}
    content = pickle.dumps(hidden.get(depth, np.array([attack], dtype=object)), protocol=4)
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.mkdir, which is refused"):
        read(content)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()


ARRAY = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R"
UINT8 = b"cnumpy\ndtype\nU\x02u1\x85R"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(VALUES)[:-40], "not a readable pickle of arrays"),
        (b"", "not a readable pickle of arrays: "),
        (b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.", r"asks for builtins\.eval"),
        (pickle.dumps(OrderedDict(a=1), protocol=2), r"asks for collections\.OrderedDict"),
        (pickle.dumps(np.array([(1, 2.0)], dtype="i4,f4")), "arrays of type 'V8' are refused"),
        (b"\x80\x02cnumpy\nndarray\n(K\x02tR.", "numpy.ndarray is not called"),
        (b"\x80\x02cnumpy\nndarray\n.", "a name, a type or a mark stands where a value should be"),
        (b"\x80\x02cnumpy\ndtype\n}U\x01aK\x01sb.", "only an array or its type has a state"),
        (ARRAY + b".", "an array has no content"),
        (ARRAY + b"K\x01b.", "an array has a state of another form"),
        (
            ARRAY + b"(K\x01K\x02\x85" + UINT8 + b"\x89U\x01atb.",
            r"expected 2 bytes for an array of shape \(2,\), got 1 bytes",
        ),
        (ARRAY + b"(K\x01J\xff\xff\xff\xff\x85" + UINT8 + b"\x89U\x01atb.", "an array has no shape of whole numbers"),
        (ARRAY + b"(K\x01K\x01\x85K\x00\x89U\x01atb.", "an array has no plain type"),
        (b"\x80\x02]q\x00h\x00a.", "a container holds itself"),
        (b"\x80\x02cnumpy.core.multiarray\nscalar\n(K\x01U\x01atR.", "an array has no plain type"),
        (b"\x80\x02c__builtin__\nbytes\n(J\x00\x00\x00\x7ftR.", "takes 0 positional arguments but 1 was given"),
        (b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.", "only latin1 text"),
    ],
    ids=[
        *("cut", "empty", "eval", "other-class", "fields", "called", "bare-name", "state-of-a-name", "no-content"),
        *("odd-state", "few-bytes", "negative-shape", "no-type", "cycle", "odd-scalar", "many-bytes", "odd-encoding"),
    ],
)
def test_what_no_pickle_of_arrays_does_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(content)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("number", [0, 999, 1000, 1700])
def test_of_a_list_the_entry_is_named(number: int, protocol: int, tmp_path: Path) -> None:
    # pickle writes lists a thousand entries at a time.
    entries: list[Any] = [{"x": [number], "y": 2.0} for number in range(2000)]
    whole = pickle.dumps(entries, protocol=protocol)
    assert read(whole) == entries
    for attack in (_Runs(os.mkdir, str(tmp_path / "executed")), {"x": [1], "y": _Runs(os.mkdir, "executed")}):
        entries[number] = attack
        with pytest.raises(ValueError, match=rf"mkdir, which is refused \(at entry {number}\)$"):
            read(pickle.dumps(entries, protocol=protocol))
    with pytest.raises(ValueError, match=r"mkdir, which is refused$"):
        read(pickle.dumps({"infos": entries}, protocol=protocol))


def test_a_cut_list_names_its_last_entry() -> None:
    content = pickle.dumps([{"x": np.arange(9.0) + number} for number in range(2000)], protocol=4)
    for share in (0.3, 0.7):
        number = int(share * 2000)
        with pytest.raises(ValueError, match=r"\(at entry (\d+)\)$") as caught:
            read(content[: int(share * len(content))])
        assert abs(int(str(caught.value).rpartition(" ")[2][:-1]) - number) < 10


def test_containers_that_share_a_lot_are_read_once() -> None:
    # 2 to the power of 60 paths through 61 lists.
    value: list[Any] = [1]
    for _ in range(60):
        value = [value, value]
    got = read(pickle.dumps(value))
    for _ in range(60):
        assert got[0] is got[1]
        got = got[0]
    assert got == [1]
