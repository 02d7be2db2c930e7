"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all, and says so with hashes.

A checkpoint ``update-000123/`` holds one ``NAME.safetensors`` per group of tensors (a role, an optimiser, an
average), ``state.json`` (numbers) and ``manifest.json`` (size and SHA-256 of every other file, written last). It is
filled under a hidden name and published by a rename.
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mfd_fast.storage import read_json, read_tensors, sha256, sync, write_json, write_tensors

PREFIX = "update-"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was read back."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    """Group name to named tensors."""
    state: dict[str, Any]
    """Numbers: updates, schedule, settings."""

    def require(self, groups: Iterable[str]) -> None:
        """Raise ValueError unless all these groups of tensors are here."""
        lacking = [name for name in groups if name not in self.tensors]
        if lacking:
            raise ValueError(f"{self.path} lacks {', '.join(lacking)}: this training cannot continue from it")


def save_checkpoint(
    folder: Path, update: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write ``folder/update-NNNNNN``; delete all but the newest ``keep`` up to it, and any of later updates.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{PREFIX}{update:06d}"
    for left_over in folder.glob(f".{PREFIX}*"):  # of a process that was killed while it wrote
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = folder / f".{final.name}.{os.getpid()}"
    temporary.mkdir()
    try:
        for name, group in tensors.items():
            write_tensors(temporary / f"{name}.safetensors", group)
        write_json(temporary / "state.json", dict(state))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in temporary.iterdir()}
        write_json(temporary / MANIFEST, {"update": update, "files": files})
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    checkpoints = list_checkpoints(folder)
    newest = checkpoints.index(final)
    # Those after it are damaged or of a course that was given up; kept, they would push good ones out.
    for other in checkpoints[: max(0, newest + 1 - keep)] + checkpoints[newest + 1 :]:
        shutil.rmtree(other)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first, whole or not."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def verify_checkpoint(path: Path) -> None:
    """Raise ValueError with the file and the reason unless every file is there with the content it was written with."""
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} has no {MANIFEST}: it was never finished")
    manifest = read_json(path / MANIFEST)
    try:
        files = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / MANIFEST} does not list files with their bytes and sha256") from error
    for name, size, digest in files:
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise ValueError(f"{path} lacks {name}")
        if file.stat().st_size != size or sha256(file) != digest:
            raise ValueError(f"{file} is damaged: its content is not what was written")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after `verify_checkpoint`."""
    verify_checkpoint(path)
    groups = {file.stem: read_tensors(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(path, groups, read_json(path / "state.json"))


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, or None, and why newer ones were skipped."""
    skipped: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path), skipped
        except (ValueError, OSError) as error:
            skipped.append(f"skipped {path.name}: {error}")
    return None, skipped
