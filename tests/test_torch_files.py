"""Files of ``torch.save`` from others: what is read, and what is refused before it costs anything."""

import io
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from mfd_fast.torch_files import read_torch_file


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def changed(path: Path, pickled: bytes | None = None, compression: int = zipfile.ZIP_STORED) -> Path:
    """The same archive with another pickle, or compressed."""
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, pickled if pickled is not None and name.endswith("data.pkl") else content)
    return path


def test_what_trainings_save_is_read(tmp_path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    kept = {
        "state_dict": OrderedDict({"a": tied, "b": tied, "view": tied[:, 1], "half": torch.ones(2).bfloat16()}),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99)}]},
        "schedule": {"milestones": Counter({3: 1}), "epoch": 2, "last": None},
    }
    found = read_torch_file(saved(tmp_path / "a.ckpt", kept))
    assert found["state_dict"]["a"].equal(tied)
    assert found["state_dict"]["view"].equal(tied[:, 1])
    assert found["optimizer"]["param_groups"] == kept["optimizer"]["param_groups"]
    assert found["schedule"] == kept["schedule"]


def test_an_archive_that_unfolds_is_refused_before_it_does(tmp_path: Path) -> None:
    path = changed(saved(tmp_path / "a.ckpt", {"a": torch.zeros(1_000_000)}), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"a\.ckpt is damaged or holds no weights: .* is compressed"):
        read_torch_file(path)


def test_a_tensor_that_repeats_its_memory_without_end_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", {"a": {"deep": [torch.zeros(1).expand(10**6, 10**6)]}})
    with pytest.raises(ValueError, match=r"its tensors unfold to 4000000000000 bytes, it has \d+"):
        read_torch_file(path)


def test_a_container_in_itself_is_no_trap(tmp_path: Path) -> None:
    inside: list[Any] = [torch.ones(2)]
    inside.append(inside)
    found = read_torch_file(saved(tmp_path / "a.ckpt", {"a": inside}))
    assert found["a"][1] is found["a"]


DOUBLED = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40))
"""A tuple of two tuples of two tuples: nothing to build, but hashed it would take for ever."""
TRAPS = {
    "as a key": b"\x80\x02}" + DOUBLED + b"K\x01s.",
    "in a set": b"\x80\x02c__builtin__\nset\n]" + DOUBLED + b"a\x85R.",
    "counted": b"\x80\x02ccollections\nCounter\n]" + DOUBLED + b"a\x85R.",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("trap", TRAPS)
def test_keys_that_take_for_ever_are_refused(trap: str, tmp_path: Path) -> None:
    path = changed(saved(tmp_path / "a.ckpt", {}), TRAPS[trap])
    with pytest.raises(ValueError, match="keys and members of sets are texts or numbers"):
        read_torch_file(path)


def test_files_that_are_no_archives_are_refused(tmp_path: Path) -> None:
    legacy = io.BytesIO()
    torch.save({"a": torch.ones(2)}, legacy, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes(legacy.getvalue())
    with pytest.raises(ValueError, match=r"old\.pt is damaged or holds no weights: File is not a zip file"):
        read_torch_file(tmp_path / "old.pt")
