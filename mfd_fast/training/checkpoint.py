"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all, and says so with hashes.

A checkpoint ``update-000123/`` holds one ``NAME.safetensors`` per group of tensors (a role, an optimiser, an
average), ``state.json`` (numbers) and ``manifest.json`` (size and SHA-256 of every other file, written last). It is
filled under a hidden name and published by a rename to a name that is free, ``update-000123.1`` if the update was saved
before; only then older ones go. So there is no moment without a good checkpoint once there has been one.
"""

import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mfd_fast.storage import check_name, make_folder, read_json, read_tensors, sha256, sync, write_json, write_tensors

PREFIX = "update-"
MANIFEST = "manifest.json"
STATE = "state.json"
SUFFIX = ".safetensors"


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
        wanted = list(groups)
        lacking = [name for name in wanted if name not in self.tensors]
        if lacking:
            raise ValueError(
                f"{self.path} lacks {', '.join(lacking)}: this training cannot continue from it "
                f"(needed: {', '.join(wanted)}; there: {', '.join(self.tensors) or 'nothing'})"
            )


def save_checkpoint(
    folder: Path,
    update: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    *,
    spared: Collection[str] = (),
) -> Path:
    """Write ``folder/update-NNNNNN``; delete any of later updates, and all but the newest ``keep`` and the ``spared``.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched then.
    """
    make_folder(folder)
    for left_over in folder.glob(f".{PREFIX}*"):  # of a process that was killed while it wrote or deleted
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=folder))
    try:
        temporary.chmod(0o755)
        for name, group in tensors.items():
            write_tensors(temporary / f"{name}{SUFFIX}", group)
        write_json(temporary / STATE, dict(state))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in temporary.iterdir()}
        write_json(temporary / MANIFEST, {"update": update, "files": files})
        final = _publish(temporary, update)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    checkpoints = list_checkpoints(folder)
    newest = checkpoints.index(final)
    # Those after it are damaged or of a course that was given up; kept, they would push good ones out.
    older = [path for path in checkpoints[: max(0, newest + 1 - keep)] if path.name not in spared]
    for other in older + checkpoints[newest + 1 :]:
        delete_checkpoint(other)
    return final


def _publish(temporary: Path, update: int) -> Path:
    """Rename to the first free name of this update. A rename onto a folder that holds something fails, so none is."""
    folder = temporary.parent
    taken = [
        again
        for path in list_checkpoints(folder)
        if (number := _number(path)) and number[0] == update
        for again in (number[1],)
    ]
    final = folder / (f"{PREFIX}{update:06d}" + (f".{max(taken) + 1}" if taken else ""))
    temporary.rename(final)
    sync(folder)
    return final


def delete_checkpoint(path: Path) -> None:
    """Take a checkpoint away: under its name it is there as a whole or not at all, whenever the process is killed."""
    aside = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=path.parent))
    path.rename(aside / path.name)
    shutil.rmtree(aside, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first, whole or not."""
    found = [(number, path) for path in folder.glob(f"{PREFIX}*") if (number := _number(path)) is not None]
    return [path for _, path in sorted(found)]


def _number(path: Path) -> tuple[int, int] | None:
    """Update and how often it had been saved before; None for a name that is no checkpoint's."""
    match = re.fullmatch(rf"{PREFIX}([0-9]{{1,18}})(?:\.([0-9]{{1,9}}))?", path.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """File name to size in bytes and SHA-256, as the manifest says; ValueError if it is no such list.

    A name that leads out of the folder is refused here, before anything is read.
    """
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} has no {MANIFEST}: it was never finished")
    manifest = read_json(path / MANIFEST)
    try:
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / MANIFEST} does not list files with their bytes and sha256") from error
    for name in files:
        check_name(name, f"{path / MANIFEST} is wrong: a file")
    if STATE not in files:
        raise ValueError(f"{path / MANIFEST} does not list {STATE}")
    return files


def verify_checkpoint(path: Path) -> dict[str, tuple[int, str]]:
    """The manifest's files; ValueError with the file and the reason unless each is there as it was written."""
    files = read_manifest(path)
    for name, (size, digest) in files.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise ValueError(f"{path} lacks {name}")
        if file.stat().st_size != size or sha256(file) != digest:
            raise ValueError(f"{file} is damaged: its content is not what was written")
    return files


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after `verify_checkpoint`; only what its manifest lists."""
    names = sorted(verify_checkpoint(path))
    groups = {name.removesuffix(SUFFIX): read_tensors(path / name) for name in names if name.endswith(SUFFIX)}
    state = read_json(path / STATE)
    if not isinstance(state, dict):
        raise ValueError(f"{path / STATE} must hold a JSON object, got {type(state).__name__}")
    return Checkpoint(path, groups, state)


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, or None, and why newer ones were skipped."""
    skipped: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path), skipped
        except (ValueError, OSError) as error:
            skipped.append(f"skipped {path.name}: {error}")
    return None, skipped


def prune_checkpoints(folder: Path, keep: int, *, spared: Collection[str] = ()) -> list[Path]:
    """Delete all but the newest ``keep`` that verify, and those of them called ``spared``; returns what went.

    With none that verifies nothing goes.

    Raises:
        ValueError: keep is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    good: list[Path] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
        except (ValueError, OSError):
            continue
        good.append(path)
    staying = good[:keep] + [path for path in good if path.name in spared]
    gone = [path for path in list_checkpoints(folder) if path not in staying] if good else []
    for path in gone:
        delete_checkpoint(path)
    return gone
