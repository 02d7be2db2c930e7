import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mfd_fast.training import checkpoint
from mfd_fast.training.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)

TENSORS = {"student": {"a.weight": torch.arange(6.0).view(2, 3), "step": torch.tensor(3.0)}, "empty": {}}


def save(folder: Path, update: int, keep: int = 2) -> Path:
    return save_checkpoint(folder, update, TENSORS, {"done": update}, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    read = load_checkpoint(save(tmp_path / "new" / "folder", 12))
    assert read.path == tmp_path / "new" / "folder" / "update-000012"
    assert read.state == {"done": 12}
    assert read.tensors.keys() == {"student", "empty"}
    assert read.tensors["empty"] == {}
    assert torch.equal(read.tensors["student"]["a.weight"], TENSORS["student"]["a.weight"])
    assert read.tensors["student"]["step"].shape == ()


def test_views_and_shared_memory_are_saved(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    path = save_checkpoint(tmp_path, 1, {"x": {"a": base.t(), "b": base[:, 1], "c": base}}, {}, 1)
    read = load_checkpoint(path).tensors["x"]
    assert torch.equal(read["a"], base.t())
    assert torch.equal(read["b"], base[:, 1])


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for update in (5, 100, 20, 1_000_000):
        save(tmp_path, update)
    # 20 was saved after 100: that course was given up.
    assert names(tmp_path) == ["update-000020", "update-1000000"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["update-000020", "update-1000000"]


def test_an_abandoned_later_checkpoint_does_not_push_a_good_one_out(tmp_path: Path) -> None:
    save(tmp_path, 10, keep=1)
    damaged = save(tmp_path, 20, keep=2)
    (damaged / "state.json").write_text("{}")
    save(tmp_path, 15, keep=1)
    found, skipped = latest_checkpoint(tmp_path)
    assert names(tmp_path) == ["update-000015"]
    assert found is not None
    assert found.state == {"done": 15}
    assert skipped == []


def test_the_same_update_is_saved_beside_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 3)
    path = save_checkpoint(tmp_path, 3, {}, {"again": True}, 2)
    assert names(tmp_path) == ["update-000003", "update-000003.1"]
    assert list_checkpoints(tmp_path)[-1] == path
    assert latest_checkpoint(tmp_path)[0].state == {"again": True}
    save_checkpoint(tmp_path, 3, {}, {"again": 2}, 1)
    assert names(tmp_path) == ["update-000003.2"]
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["update-000004"]


def test_there_is_never_a_moment_without_a_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at before and after every call that changes the file system, keeping one, the same update again."""
    save(tmp_path, 3, keep=1)
    looked = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            for moment in (0, 1):
                found, _ = latest_checkpoint(tmp_path)
                assert found is not None, (name, moment)
                looked.append(name)
                if moment == 0:
                    result = original(*arguments, **options)
            return result

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((Path, "rename"), (shutil, "rmtree"), (Path, "unlink"), (Path, "replace"), (os, "fsync")):
        watch(owner, name)
    save(tmp_path, 3, keep=1)
    save(tmp_path, 2, keep=1)
    assert {"rename", "rmtree", "fsync"} <= set(looked)


@pytest.mark.parametrize("failing", ["write_tensors", "write_json", "sha256"])
def test_a_write_that_fails_leaves_what_was_there(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, failing, fail)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 1)
    assert names(tmp_path) == ["update-000001"]
    assert load_checkpoint(tmp_path / "update-000001").state == {"done": 1}


def test_an_interrupt_in_the_middle_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "sha256", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert names(tmp_path) == ["update-000001"]


def test_what_a_killed_process_left_is_cleared_and_never_read(tmp_path: Path) -> None:
    left = tmp_path / ".update-000009.12345"
    left.mkdir()
    (left / "student.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    save(tmp_path, 1)
    assert names(tmp_path) == ["update-000001"]


def truncate(path: Path) -> None:
    file = path / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    file = path / "student.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 128
    file.write_bytes(content)


def escape(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../outside"] = {"bytes": 0, "sha256": ""}
    (path.parent / "outside").touch()
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "student.safetensors is damaged"),
    "flipped bit": (flip, "student.safetensors is damaged"),
    "file gone": (lambda path: (path / "state.json").unlink(), "lacks state.json"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "no manifest.json: it was never finished"),
    "manifest cut": (lambda path: (path / "manifest.json").write_text('{"fi'), "manifest.json is not valid JSON"),
    "manifest of another kind": (lambda path: (path / "manifest.json").write_text("[]"), "does not list files"),
    "manifest without sizes": (
        lambda path: (path / "manifest.json").write_text('{"files": {"state.json": {}}}'),
        "does not list files",
    ),
    "path that leaves the folder": (escape, "a file must be a plain name, got '../outside'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_and_the_one_before_is_used(damage: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    spoil, words = DAMAGES[damage]
    spoil(newest)
    with pytest.raises(ValueError, match=words):
        verify_checkpoint(newest)
    found, skipped = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.state == {"done": 1}
    assert len(skipped) == 1
    assert skipped[0].startswith("skipped update-000002: ")
    assert words in skipped[0]


def test_a_missing_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") == (None, [])
    (tmp_path / "update-abc").mkdir()
    assert list_checkpoints(tmp_path) == []


def test_require_names_what_is_lacking(tmp_path: Path) -> None:
    read = load_checkpoint(save(tmp_path, 1))
    read.require(["student", "empty"])
    with pytest.raises(ValueError, match="update-000001 lacks auxiliary, average"):
        read.require(["auxiliary", "student", "average"])
