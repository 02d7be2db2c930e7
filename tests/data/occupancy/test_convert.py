"""From the files that OccFM releases to windows: conversion, order, what is refused, and the windows themselves."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mfd_fast.data.occupancy.convert import convert
from mfd_fast.data.occupancy.store import FramesOnDisk, Scene, Windows, window_starts
from mfd_fast.storage import read_json, write_json, write_tensors

LENGTHS = {"scene-b": 5, "scene-a": 3, "scene-c": 4}
"""Frames of the scenes, in the order of the infos, which is not the alphabet's."""


def entry(scene: str, frame: int, **changes: Any) -> dict[str, Any]:
    """What OccFM's ``cache_vae`` writes for one frame; its numbers say which one it is."""
    value = 100 * (ord(scene[-1]) - ord("a")) + frame
    return {
        "x_sampled": np.full((1, 4, 2, 2), value, dtype=np.float32),
        "gt_path": [[f"data/nuscenes/gts/{scene}/{scene}-{frame}/labels.npz"]],
        "gt_trajs": np.array([[value, 0.5]], dtype=np.float64),
        **changes,
    }


def entries() -> list[dict[str, Any]]:
    """All frames in a disorder that is always the same."""
    frames = [(scene, frame) for scene, count in LENGTHS.items() for frame in range(count)]
    order = np.random.default_rng(0).permutation(len(frames))
    return [entry(*frames[i]) for i in order]


def infos() -> dict[str, Any]:
    def frame(token: str) -> dict[str, Any]:
        return {"token": token, "gt_boxes": np.zeros((2, 7)), "gt_names": np.array(["car", "bus"]), "timestamp": 1.5}

    return {"infos": {name: [frame(f"{name}-{i}") for i in range(count)] for name, count in LENGTHS.items()}}


def written(folder: Path, latents: Any = None, order: Any = None) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    paths = folder / "latents.pkl", folder / "infos.pkl"
    for path, content in zip(paths, (entries() if latents is None else latents, order or infos()), strict=True):
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=4))
    return paths


def values(frames: FramesOnDisk, first: int, count: int) -> list[float]:
    return frames.read("latents", first, count)[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("frames_per_file", [1, 8, 100])
def test_frames_come_in_the_order_of_the_infos(frames_per_file: int, tmp_path: Path) -> None:
    done = convert(*written(tmp_path), tmp_path / "out", frames_per_file=frames_per_file)
    assert done == (12, 3, {1: 3, 8: 2, 100: 1}[frames_per_file], 0, 0, 0)
    frames = FramesOnDisk(tmp_path / "out")
    assert [(scene.name, len(scene.tokens)) for scene in frames.scenes] == list(LENGTHS.items())
    assert frames.scenes[0].tokens == tuple(f"scene-b-{i}" for i in range(5))
    assert frames.latent_shape == (4, 2, 2)
    assert values(frames, 0, 5) == [100, 101, 102, 103, 104]
    assert values(frames, 5, 3) == [0, 1, 2]
    assert values(frames, 9, 2) == [201, 202]
    poses = frames.read("trajectory", 8, 4)
    assert poses.dtype == torch.float32
    assert poses.tolist() == [[200, 0.5], [201, 0.5], [202, 0.5], [203, 0.5]]


def test_repeated_and_unlisted_frames(tmp_path: Path) -> None:
    # A distributed sampler repeats frames to fill its last batch; OccFM takes the first.
    again = entry("scene-a", 1, x_sampled=np.full((1, 4, 2, 2), 9.0, dtype=np.float32))
    done = convert(*written(tmp_path, [*entries(), again, entry("scene-z", 0)]), tmp_path / "out")
    assert (done.frames, done.repeated, done.unlisted, done.lacking) == (12, 1, 1, 0)
    assert values(FramesOnDisk(tmp_path / "out"), 5, 3) == [0, 1, 2]


def test_frames_without_latents_are_counted_and_passed_over(tmp_path: Path) -> None:
    # OccFM's windows go on over such a gap: they only look at the scene of each frame.
    gap = [item for item in entries() if item["gt_path"] != entry("scene-b", 2)["gt_path"]]
    done = convert(*written(tmp_path, gap), tmp_path / "out")
    assert (done.frames, done.scenes, done.lacking) == (11, 3, 1)
    assert values(FramesOnDisk(tmp_path / "out"), 0, 4) == [100, 101, 103, 104]


def test_forms_that_the_release_may_have(tmp_path: Path) -> None:
    flat = [
        item | {"gt_path": item["gt_path"][0], "x_sampled": item["x_sampled"].astype(np.float16)} for item in entries()
    ]
    convert(*written(tmp_path, flat), tmp_path / "out")
    assert values(FramesOnDisk(tmp_path / "out"), 0, 5) == [100, 101, 102, 103, 104]


def _changed(number: int, **changes: Any) -> list[dict[str, Any]]:
    changed = entries()
    changed[number] = {name: value for name, value in (changed[number] | changes).items() if value is not None}
    return changed


def _folded() -> Any:
    """A list that would be shown with 2^40 brackets."""
    value: Any = []
    for _ in range(40):
        value = [value, value]
    return value


def _token(number: int) -> str:
    return str(entries()[number]["gt_path"][0][0].split("/")[4])


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (
            _changed(3, x_sampled=np.zeros((1, 4, 2, 3), np.float32)),
            r"entry 3: x_sampled has shape \[1, 4, 2, 3\], entry 0",
        ),
        (
            _changed(3, x_sampled=np.zeros((2, 4, 2, 2), np.float32)),
            r"entry 3: x_sampled must have shape \[1, C, H, W\]",
        ),
        (
            _changed(3, x_sampled=np.zeros((4, 2, 2), np.float32)),
            r"entry 3: x_sampled must have shape .* got \[4, 2, 2\]",
        ),
        (_changed(3, x_sampled=np.zeros((1, 4, 2, 2), int)), "entry 3: x_sampled must be an array of floats .* int64"),
        (_changed(3, x_sampled=[1.0]), "entry 3: x_sampled must be an array of floats .* got a list"),
        (_changed(3, x_sampled=np.full((1, 4, 2, 2), np.nan)), "entry 3: x_sampled holds numbers that are not finite"),
        (_changed(3, gt_trajs=np.full((1, 2), 1e300)), "entry 3: gt_trajs holds numbers .* not finite in float32"),
        (_changed(3, gt_trajs=np.zeros((1, 3))), r"entry 3: gt_trajs must have shape \[1, 2\], got \[1, 3\]"),
        (_changed(3, gt_path=None), "entry 3: lacks gt_path; it has x_sampled, gt_trajs"),
        (_changed(3, gt_path=["a/b/labels.npz", "a/c/labels.npz"]), "entry 3: gt_path must be one path that ends in"),
        (_changed(3, gt_path=_folded()), "entry 3: gt_path must be one path that ends in .*, got a list"),
        (
            _changed(3, gt_path=[f"data/nuscenes/gts/scene-a/{_token(3)}/labels.npz"]),
            r"latents\.pkl, entry 3: its gt_path says scene 'scene-a', .*infos\.pkl lists 'scene-[bc]-\d' in 'scene-",
        ),
        (_changed(3, gt_path=["labels.npz"]), "entry 3: gt_path must be one path that ends in SCENE/TOKEN/labels.npz"),
        ([1, 2], "entry 0: expected a dictionary, got int"),
        ([], "no cache of latents: expected a list with one entry for each frame, got an empty list"),
        (infos(), "no cache of latents: expected a list with one entry for each frame, got a dict"),
        (
            pickle.dumps(np.array(entries(), dtype=object)),
            r"latents\.pkl is no cache of latents: expected a list with one entry for each frame, got a ndarray",
        ),
        (
            pickle.dumps(entries())[:-100],
            r"latents\.pkl \(\d+ bytes\): not a readable pickle of arrays: .* \(at entry 11\)",
        ),
        (b"no pickle", r"latents\.pkl \(9 bytes\): not a readable pickle of arrays"),
    ],
    ids=[
        *("other-size", "two-rows", "dimensions", "whole-numbers", "list", "nan", "beyond-float32", "pose"),
        *("no-path", "two-paths"),
        *("folded-path", "other-scene"),
        *("short-path", "numbers", "empty", "infos-as-latents", "array", "cut", "text"),
    ],
)
def test_wrong_latents_name_file_and_entry(latents: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert(*written(tmp_path, latents), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["infos.pkl", "latents.pkl"]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (entries(), r"infos\.pkl is no infos file of OccFM: expected a dictionary with 'infos', .* got a list"),
        (
            {"metainfo": {}, "data_list": []},
            r"scene by scene, got a dictionary with metainfo \(a dict\), data_list \(a list\)",
        ),
        ({"infos": [{"token": "a"}]}, r"scene by scene, got a dictionary with infos \(a list\)"),
        ({"infos": {"s": [{"token": "a"}] * 2}}, r"scene 's' lists 'a', which scene 's' has listed before"),
        (
            {"infos": {"s": [{"token": "a"}], "u": [{"token": "a"}]}},
            r"scene 'u' lists 'a', which scene 's' has listed before",
        ),
        ({"infos": {"s": [{"token": "a"}, {"name": "b"}]}}, r"infos\.pkl: scene 's', frame 1: expected .* 'token'"),
        ({"infos": {"s": 3}}, r"infos\.pkl: scene 's': expected a list of frames, got int"),
        ({"infos": {"s": [{"token": "x"}]}}, "lists none of the 12 frames of .*: are they of the same split"),
    ],
    ids=[
        *("latents-as-infos", "data-list", "flat-list", "twice", "in-two-scenes"),
        *("no-token", "no-frames", "other-split"),
    ],
)
def test_wrong_infos_name_the_file(order: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert(*written(tmp_path, None, order), tmp_path / "out")


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_malicious_cache_is_refused_unexecuted(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    paths = written(tmp_path, _changed(3, gt_trajs=_Runs(mark)))
    with pytest.raises(ValueError, match=r"latents\.pkl .*asks for (posix|nt)\.mkdir, which is refused"):
        convert(*paths, tmp_path / "out")
    assert not mark.exists()


def test_places_that_cannot_be_used(tmp_path: Path) -> None:
    latents, order = written(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.pkl"):
        convert(tmp_path / "nowhere.pkl", order, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists already"):
        convert(latents, order, tmp_path / "out")
    with pytest.raises(ValueError, match="frames_per_file must be at least 1, got 0"):
        convert(latents, order, tmp_path / "other", frames_per_file=0)


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt("Ctrl-C")])
def test_a_conversion_that_fails_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise error

    paths = written(tmp_path)
    monkeypatch.setattr("mfd_fast.data.occupancy.convert.write_tensors", full)
    with pytest.raises(type(error), match=str(error)):
        convert(*paths, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["infos.pkl", "latents.pkl"]


def _drop_index(folder: Path) -> None:
    (folder / "index.json").unlink()


def _cut_file(folder: Path) -> None:
    path = folder / "frames-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _other_version(folder: Path) -> None:
    write_json(folder / "index.json", read_json(folder / "index.json") | {"version": 9})


def _fewer_keys(folder: Path) -> None:
    write_json(folder / "index.json", {"format": "mfd_fast occupancy latents", "version": 1})


def _fewer_tokens(folder: Path) -> None:
    index = read_json(folder / "index.json")
    index["scenes"][0]["tokens"].pop()
    write_json(folder / "index.json", index)


def _change(*path: str | int, value: object) -> Callable[[Path], None]:
    """Puts a value somewhere into the index."""

    def change(folder: Path) -> None:
        index = read_json(folder / "index.json")
        inner = index
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value
        write_json(folder / "index.json", index)

    return change


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (
            _change("files", 0, "file", value="../a"),
            ValueError,
            r"index\.json: a file must be a plain name, got '\.\./a'",
        ),
        (_change("files", 0, "file", value="/etc/hostname"), ValueError, "a file must be a plain name"),
        (_change("scenes", 0, "name", value=".."), ValueError, r"a scene must be a plain name, got '\.\.'"),
        (_change("scenes", 0, "tokens", 1, value="a/b"), ValueError, "a token must be a plain name, got 'a/b'"),
        (_change("files", 0, "frames", value=-1), ValueError, "frames must be a whole number above 0, got -1"),
        (_change("latent_shape", 1, value=2.0), ValueError, r"latent_shape must be a whole number above 0, got 2\.0"),
        (_drop_index, FileNotFoundError, r"has no index\.json: make it with mfd-fast convert-occfm"),
        (_cut_file, ValueError, r"frames-0001\.safetensors should have \d+ bytes, there is \d+ bytes"),
        (_other_version, ValueError, r"index\.json: has format .* version 9, expected .* version 1"),
        (_fewer_keys, ValueError, r"index\.json is not an index of occupancy latents: KeyError\('latent_shape'\)"),
        (_fewer_tokens, ValueError, r"index\.json: lists 12 frames in files and another number in scenes"),
    ],
)
def test_damaged_folders_are_named(
    damage: Callable[[Path], None], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    convert(*written(tmp_path), tmp_path / "out", frames_per_file=8)
    damage(tmp_path / "out")
    with pytest.raises(kind, match=message):
        FramesOnDisk(tmp_path / "out")


def test_files_that_do_not_hold_what_the_index_says(tmp_path: Path) -> None:
    convert(*written(tmp_path), tmp_path / "out", frames_per_file=8)
    path = tmp_path / "out" / "frames-0001.safetensors"
    size = path.stat().st_size
    path.write_bytes(b"\xff" * size)
    with pytest.raises(ValueError, match=r"frames-0001\.safetensors is not a file of frames"):
        FramesOnDisk(tmp_path / "out").read("latents", 8, 2)
    write_tensors(path, {"latents": torch.zeros(4, 4, 2, 1), "trajectory": torch.zeros(4, 2)})
    index = read_json(tmp_path / "out" / "index.json")
    index["files"][1]["bytes"] = path.stat().st_size
    write_json(tmp_path / "out" / "index.json", index)
    with pytest.raises(
        ValueError, match=r"frames-0001\.safetensors does not hold the latents that index\.json promises"
    ):
        FramesOnDisk(tmp_path / "out").read("latents", 8, 2)


def test_files_that_vanish_are_named_when_they_are_needed(tmp_path: Path) -> None:
    convert(*written(tmp_path), tmp_path / "out", frames_per_file=8)
    frames = FramesOnDisk(tmp_path / "out")
    before = frames.read("latents", 0, 5)
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    assert torch.equal(frames.read("latents", 0, 5), before)
    with pytest.raises(ValueError, match=r"frames-0001\.safetensors is not a file of frames: .*[Nn]o such file"):
        frames.read("latents", 8, 2)


# Windows, against OccFM's own way of finding and cutting them, restated.


def starts_as_occfm_finds_them(scenes: list[str], length: int) -> list[int]:
    found = []
    for start in range(len(scenes)):
        part = scenes[start : start + length]
        if len(part) == length and len(set(part)) == 1:
            found.append(start)
    return found


@pytest.mark.parametrize("length", [1, 3, 4, 6])
def test_windows_stay_in_their_scene(length: int, tmp_path: Path) -> None:
    convert(*written(tmp_path), tmp_path / "out")
    scenes = FramesOnDisk(tmp_path / "out").scenes
    by_frame = [scene.name for scene in scenes for _ in scene.tokens]
    assert window_starts(scenes, length).tolist() == starts_as_occfm_finds_them(by_frame, length)


@pytest.mark.parametrize("frames_per_file", [1, 100])
@pytest.mark.parametrize("last", [1, 2])
def test_rows_are_what_occfm_cuts(last: int, frames_per_file: int, tmp_path: Path) -> None:
    convert(*written(tmp_path), tmp_path / "out", frames_per_file=frames_per_file)
    frames = FramesOnDisk(tmp_path / "out")
    starts = window_starts(frames.scenes, 4)
    latents = torch.cat([torch.tensor(values(frames, first, count)) for first, count in ((0, 5), (5, 3), (8, 4))])
    history = Windows(frames, "latents", starts, 0, 2, 2 - last, 10.0)
    future = Windows(frames, "latents", starts, 2, 2, 2 - last, 10.0)
    trajectory = Windows(frames, "trajectory", starts, 0, 4, 2 - last)
    assert history.shape == (3, 2, 4, 2, 2)
    assert trajectory.shape == (3, 4, 2)
    index = torch.tensor([2, 0])
    for row, start in zip(index.tolist(), (8, 0), strict=True):
        window = 10 * latents[start : start + 4]
        window[: 2 - last] = 0
        one = torch.tensor([row])
        torch.testing.assert_close(history[one][0, :, 0, 0, 0], window[:2])
        torch.testing.assert_close(future[one][0, :, 0, 0, 0], window[2:])
        poses = latents[start : start + 4].clone()
        poses[: 2 - last] = 0
        torch.testing.assert_close(trajectory[one][0, :, 0], poses)
    assert torch.equal(history[index][0], history[torch.tensor([2])][0])
    assert len(history) == 3
    assert history.dtype == torch.float32


def test_reading_changes_nothing_in_memory() -> None:
    from mfd_fast.data.occupancy.store import FramesInMemory

    held = FramesInMemory((Scene("s", ("a", "b", "c")),), torch.ones(3, 4, 2, 2), torch.ones(3, 2))
    rows = Windows(held, "latents", torch.tensor([0]), 0, 3, blank=2)
    cut: Tensor = rows[torch.tensor([0])]
    assert cut[0, :, 0, 0, 0].tolist() == [0, 0, 1]
    assert held.latents.min() == 1
