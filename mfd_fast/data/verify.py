"""Prepared data, encoded prompts or converted latents: whether every file is still the one that was written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mfd_fast.data.occupancy.store import FORMAT as OCCUPANCY
from mfd_fast.data.occupancy.store import INDEX, FramesOnDisk
from mfd_fast.data.prompt_store import PromptStore
from mfd_fast.storage import read_json, sha256


def prepared_folders(folder: Path) -> list[Path]:
    """``folder`` if it holds prepared data, or those of its folders that do (``training``, ``validation``).

    Raises:
        ValueError: there are none.
    """
    found = [part for part in (folder, *sorted(folder.glob("*/"))) if (part / INDEX).is_file()]
    if not found:
        raise ValueError(f"{folder} holds neither encoded prompts nor converted latents: there is no {INDEX}")
    return found[:1] if found[0] == folder else found


def recorded_digests(folder: Path) -> dict[Path, str]:
    """The SHA-256 digests in the index of prepared data, by file.

    Raises:
        ValueError: the index is none, or files are missing or of another size.
    """
    index = read_json(folder / INDEX)
    is_occupancy = isinstance(index, dict) and index.get("format") == OCCUPANCY
    store: FramesOnDisk | PromptStore = FramesOnDisk(folder) if is_occupancy else PromptStore(folder)
    return store.digests


def damaged_files(digests: dict[Path, str], progress: Callable[[Path], Any] = lambda path: None) -> dict[Path, str]:
    """By file that is not what was written, what is wrong with it; all files are read."""
    damaged = {}
    for path, digest in digests.items():
        try:
            if sha256(path) != digest:
                damaged[path] = "its content is not what was written"
        except OSError as error:
            damaged[path] = str(error)
        progress(path)
    return damaged
