import hashlib
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mfd_fast import storage
from mfd_fast.storage import (
    UNFINISHED,
    delete_folder,
    read_json,
    read_tensors,
    sha256,
    whole_folder,
    write_file,
    write_json,
    write_tensors,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_is_written_as_utf8_and_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "note.txt"
    write_text(path, "Fréchet\n")
    assert path.read_bytes() == "Fréchet\n".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    write_text(path, "again")
    assert path.read_text() == "again"
    assert names(path.parent) == ["note.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bad")])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the ne")
        raise error

    with pytest.raises(type(error)):
        write_file(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_the_content_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, bool]] = []
    real = storage.sync

    def sync(path: Path) -> None:
        order.append((path.name if path.is_dir() else "content", (tmp_path / "file").exists()))
        real(path)

    monkeypatch.setattr(storage, "sync", sync)
    write_text(tmp_path / "file", "x")
    assert order == [("content", False), (tmp_path.name, True)]


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "b": {"c": "é"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_without_numbers_json_does_not_know(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"a": value})
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b'{"a": 1', b"\xff\xfe", b""])
def test_json_that_is_not_valid_names_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_tensors_of_any_layout_round_trip(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(2, 3, 4)
    tensors = {
        "transposed": base.transpose(0, 2),
        "strided": base[:, ::2],
        "shared": base,
        "again": base,
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "weight": torch.nn.Parameter(torch.ones(2)),
    }
    write_tensors(tmp_path / "a.safetensors", tensors)
    read = read_tensors(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value.detach()), name
        assert not read[name].requires_grad


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "[:10]])
def test_tensors_that_are_damaged_name_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors is not a valid safetensors file"):
        read_tensors(tmp_path / "a.safetensors")


def test_digest_of_more_than_a_block(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


MAKING = """
import sys
from pathlib import Path
from mfd_fast.storage import whole_folder
with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("of it")
    print("begun", flush=True)
    sys.stdin.read()
"""


def making(target: Path) -> "subprocess.Popen[str]":
    """Another process that makes ``target`` and stays in the middle of it until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKING, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_what_a_killed_process_left_is_cleared_away_and_what_a_live_one_makes_is_not(tmp_path: Path) -> None:
    killed, live = making(tmp_path / "killed"), making(tmp_path / "live")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(names(tmp_path)) == 2
    stranger = tmp_path / f"{UNFINISHED}.another-host.0.1.x"
    stranger.mkdir()
    (tmp_path / "deleted").mkdir()
    delete_folder(tmp_path / "deleted")
    hidden = names(tmp_path)
    assert len(hidden) == 2
    assert stranger.name in hidden
    live.communicate()
    assert live.returncode == 0
    assert names(tmp_path) == [stranger.name, "live"]
    assert names(tmp_path / "live") == ["half"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_folder_that_fails_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def make() -> None:
        with whole_folder(tmp_path / "folder") as folder:
            (folder / "half").write_text("of it")
            assert not (tmp_path / "folder").exists()
            raise error

    with pytest.raises(type(error)):
        make()
    assert names(tmp_path) == []


def test_a_whole_folder_is_like_any_other_and_replaces_none(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with whole_folder(tmp_path / "new" / "folder") as folder:
        (folder / "file").write_text("x")
    assert names(tmp_path / "new") == ["folder"]
    assert (tmp_path / "new" / "folder").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(ValueError, match="folder exists already"), whole_folder(tmp_path / "new" / "folder"):
        pass

    def race() -> None:
        with whole_folder(tmp_path / "raced"):  # another process is faster
            (tmp_path / "raced").mkdir()
            (tmp_path / "raced" / "file").touch()

    with pytest.raises(OSError, match="not empty"):
        race()
    assert names(tmp_path / "raced") == ["file"]
    assert names(tmp_path) == ["new", "plain", "raced"]


def test_what_is_written_is_not_copied_in_memory_without_need() -> None:
    """A checkpoint of a large role would otherwise need its largest group of tensors twice."""
    whole, tied = torch.arange(6.0).reshape(2, 3), torch.ones(4)
    given = {
        "own": torch.ones(5),
        "rows": whole[1:],
        "turned": whole.T,
        "first": tied,
        "again": tied,
        "none": torch.ones(0),
    }
    plain = storage._of_their_own(given)
    assert {name: torch.equal(value, given[name]) for name, value in plain.items()} == dict.fromkeys(given, True)
    same = {name for name, value in plain.items() if value.numel() and value.data_ptr() == given[name].data_ptr()}
    assert same == {"own", "first"}
    assert all(value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes for value in plain.values())
