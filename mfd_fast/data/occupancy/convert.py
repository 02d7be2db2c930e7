"""From OccFM's cached latents (a pickle) to files that can be read in parts and run nothing.

The cache is a list of ``{"x_sampled": [1, C, H, W], "gt_path": [PATH] or [[PATH]], "gt_trajs": [1, 2]}``, one entry a
frame in any order, with PATH ending in ``SCENE/TOKEN/labels.npz``. The order of the frames is that of the infos file,
``{"infos": {SCENE: [{"token": TOKEN, ...}, ...]}}``.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from mfd_fast.data.occupancy.store import FORMAT, INDEX, VERSION
from mfd_fast.data.plain_pickle import read_plain_pickle
from mfd_fast.storage import check_name, sha256, whole_folder, write_json, write_tensors

FRAMES_PER_FILE = 1024


class Conversion(NamedTuple):
    """What a conversion did."""

    frames: int
    scenes: int
    files: int
    repeated: int
    """Entries of a frame that had come before; the first one counts, as in OccFM."""
    unlisted: int
    """Entries whose frame the infos do not list."""
    lacking: int
    """Listed frames without an entry. As in OccFM the frames around one follow each other in windows."""


class _Entry(NamedTuple):
    number: int
    scene: str
    latent: NDArray[np.float32]
    """``[C, H, W]``."""
    pose: NDArray[np.float32]
    """``[2]``."""


def convert(latents: Path, infos: Path, out: Path, *, frames_per_file: int = FRAMES_PER_FILE) -> Conversion:
    """Convert one split of the cached latents into the folder ``out``, which appears whole or not at all.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: ``out`` exists, a pickle is damaged, asks for something to be run, or is of another kind, an entry
            has a wrong shape, or the files disagree about a frame's scene; the message names file and entry.
    """
    if frames_per_file < 1:
        raise ValueError(f"frames_per_file must be at least 1, got {frames_per_file}")
    if out.exists():
        raise ValueError(f"--out: {out} exists already; choose another folder or delete it")
    order = read_order(infos)
    entries, repeated = read_entries(latents)
    listed = {name: [token for token in tokens if token in entries] for name, tokens in order.items()}
    scenes = {name: tokens for name, tokens in listed.items() if tokens}
    for name, tokens in scenes.items():
        for token in tokens:
            if entries[token].scene != name:
                raise ValueError(
                    f"{latents}, entry {entries[token].number}: its gt_path says scene {entries[token].scene!r}, "
                    f"{infos} lists {token!r} in {name!r}: are they of the same data?"
                )
    kept = sum(len(tokens) for tokens in scenes.values())
    if not kept:
        raise ValueError(f"{infos} lists none of the {len(entries)} frames of {latents}: are they of the same split?")
    with whole_folder(out) as folder:
        files = _write_files(folder, scenes, entries, frames_per_file)
        shape = list(next(iter(entries.values())).latent.shape)
        described = [{"name": name, "tokens": tokens} for name, tokens in scenes.items()]
        index = {"format": FORMAT, "version": VERSION, "latent_shape": shape, "files": files, "scenes": described}
        write_json(folder / INDEX, index)
    lacking = sum(len(tokens) for tokens in order.values()) - kept
    return Conversion(kept, len(scenes), len(files), repeated, len(entries) - kept, lacking)


def _write_files(
    folder: Path, scenes: Mapping[str, list[str]], entries: Mapping[str, _Entry], frames_per_file: int
) -> list[dict[str, Any]]:
    """Write all frames, whole scenes to a file; what the index says of each file."""
    groups: list[list[str]] = [[]]
    for tokens in scenes.values():
        if groups[-1] and len(groups[-1]) + len(tokens) > frames_per_file:
            groups.append([])
        groups[-1] += tokens
    described = []
    with tqdm(total=sum(map(len, groups)), desc="converting", unit="frame", dynamic_ncols=True, disable=None) as bar:
        for number, tokens in enumerate(groups):
            path = folder / f"frames-{number:04d}.safetensors"
            latents = np.stack([entries[token].latent for token in tokens])
            poses = np.stack([entries[token].pose for token in tokens])
            write_tensors(path, {"latents": torch.from_numpy(latents), "trajectory": torch.from_numpy(poses)})
            described.append(
                {"file": path.name, "frames": len(tokens), "bytes": path.stat().st_size, "sha256": sha256(path)}
            )
            bar.update(len(tokens))
    return described


def read_order(path: Path) -> dict[str, list[str]]:
    """The tokens of every scene in their order in time, from an infos file; errors as in `convert`."""
    content = _read(path)
    scenes = content.get("infos") if isinstance(content, dict) else None
    if not isinstance(scenes, dict):
        raise ValueError(
            f"{path} is no infos file of OccFM: expected a dictionary with 'infos', a dictionary scene by scene, got "
            f"{_outline(content)}"
        )
    order: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    for name, frames in scenes.items():
        if not isinstance(name, str) or not isinstance(frames, list):
            raise ValueError(f"{path}: scene {name!r}: expected a list of frames, got {type(frames).__name__}")
        tokens: list[Any] = [frame.get("token") if isinstance(frame, dict) else None for frame in frames]
        wrong = next((i for i, token in enumerate(tokens) if not isinstance(token, str)), None)
        if wrong is not None:
            raise ValueError(f"{path}: scene {name!r}, frame {wrong}: expected a dictionary with a text 'token'")
        for part, what in ((name, "scene"), *((token, "token") for token in tokens)):
            check_name(part, f"{path}: a {what}")
        for token in tokens:
            if token in seen:
                before = seen[token]
                raise ValueError(f"{path}: scene {name!r} lists {token!r}, which scene {before!r} has listed before")
            seen[token] = name
        order[name] = tokens
    return order


def _outline(content: Any) -> str:
    """What a file holds, in a few words; a container may unfold to any size, so none is shown."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    parts = [f"{str(key)[:40]} (a {type(value).__name__})" for key, value in list(content.items())[:5]]
    return f"a dictionary with {', '.join(parts) or 'nothing'}"


def read_entries(path: Path) -> tuple[dict[str, _Entry], int]:
    """The entries of a cache by token, and how many repeated one that had come before; errors as in `convert`."""
    content = _read(path)
    if not isinstance(content, list) or not content:
        kind = "an empty list" if isinstance(content, list) else f"a {type(content).__name__}"
        raise ValueError(f"{path} is no cache of latents: expected a list with one entry for each frame, got {kind}")
    entries: dict[str, _Entry] = {}
    repeated = 0
    for number, entry in enumerate(content):
        try:
            token, parsed = _entry(number, entry)
        except ValueError as error:
            raise ValueError(f"{path}, entry {number}: {error}") from error
        first = next(iter(entries.values()), parsed)
        if parsed.latent.shape != first.latent.shape:
            raise ValueError(
                f"{path}, entry {number}: x_sampled has shape {[1, *parsed.latent.shape]}, entry {first.number} has "
                f"{[1, *first.latent.shape]}"
            )
        repeated += token in entries
        entries.setdefault(token, parsed)
    return entries, repeated


def _entry(number: int, entry: Any) -> tuple[str, _Entry]:
    if not isinstance(entry, dict):
        raise ValueError(f"expected a dictionary, got {type(entry).__name__}")
    lacking = [name for name in ("x_sampled", "gt_path", "gt_trajs") if name not in entry]
    if lacking:
        raise ValueError(f"lacks {', '.join(lacking)}; it has {', '.join(map(str, entry)) or 'nothing'}")
    latent = _numbers("x_sampled", entry["x_sampled"], 4, "[1, C, H, W]")
    pose = _numbers("gt_trajs", entry["gt_trajs"], 2, "[1, 2]")
    if len(latent) != 1 or 0 in latent.shape:
        raise ValueError(f"x_sampled must have shape [1, C, H, W], got {list(latent.shape)}")
    if pose.shape != (1, 2):
        raise ValueError(f"gt_trajs must have shape [1, 2], got {list(pose.shape)}")
    path = entry["gt_path"]
    while isinstance(path, list) and len(path) == 1:
        path = path[0]
    parts = PurePosixPath(path).parts if isinstance(path, str) else ()
    if len(parts) < 3 or parts[-1] != "labels.npz":
        got = repr(path[-80:]) if isinstance(path, str) else f"a {type(path).__name__}"
        raise ValueError(f"gt_path must be one path that ends in SCENE/TOKEN/labels.npz, got {got}")
    return parts[-2], _Entry(number, parts[-3], latent[0], pose[0])


def _numbers(name: str, value: Any, dimensions: int, shape: str) -> NDArray[np.float32]:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise ValueError(f"{name} must be an array of floats of shape {shape}, got {kind}")
    if value.ndim != dimensions:
        raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")
    with np.errstate(over="ignore"):
        single = value.astype(np.float32, copy=False)
    if not np.isfinite(single).all():
        raise ValueError(f"{name} holds numbers that are not finite in float32")
    return single


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    size = path.stat().st_size
    bar = tqdm(total=size, desc=f"reading {path.name}", unit="B", unit_scale=True, dynamic_ncols=True, disable=None)
    with path.open("rb") as stream, bar:
        try:
            content = read_plain_pickle(stream, lambda position: bar.update(position - bar.n))
        except ValueError as error:
            raise ValueError(f"{path} ({size} bytes): {error}") from error
        bar.update(size - bar.n)
    return content
