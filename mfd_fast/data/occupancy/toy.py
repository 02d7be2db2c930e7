"""A small world of moving boxes, in memory or in the files and formats of OccFM's release.

Posts stand still, and a car or a truck goes round each of them by three of its sides, again and again, so that the past
decides what will be occupied. But boxes also shimmer: at every frame the direction in the latent of each of their cells
is drawn anew, which the grid does not show. The future latents of a cell therefore lie on a sphere, all of them right,
and their mean at its centre is an empty place. The vehicle stands, or now and then drives on by a cell; everything is
seen from it.
"""

import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfd_fast.data.occupancy.codec import EMPTY, KINDS, columns_of, encode
from mfd_fast.data.occupancy.store import FramesInMemory, Scene
from mfd_fast.storage import whole_folder, write_file

SIDE = 12
"""Cells along each side of what is seen."""
BLOCK, BLOCKS = 6, 3
"""The world is a ring in both directions, of 3 x 3 blocks of 6 x 6 cells with at most one post each."""
POST_SHARE = 0.7
"""Share of the blocks with a post."""
CELL_METRES = 0.8
DRIVE_SHARE = 0.03
"""Share of the frames after which the vehicle drives on."""
FRAMES_PER_SCENE = 12
SPLITS = {"training": (400, 0), "validation": (48, 1)}
"""Scenes and number of the random stream of each split."""
SIDES = ((1, 0), (0, 1), (-1, 0), (0, -1))
ROUND = 3
"""Frames after which a box is at the same side again."""
LONG, DEEP = 3, 2
"""Cells of a box along and away from its post."""
CAR, TRUCK, POST = range(len(KINDS))


class ToySplit(NamedTuple):
    """One split of the toy set."""

    frames: FramesInMemory
    grids: Tensor
    """uint8 ``[M, 24, 24, 4]``."""


def make_split(split: str, seed: int = 0, scenes: int | None = None) -> ToySplit:
    """The split ``training`` or ``validation``; the same seed makes the same scenes."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    count, stream = SPLITS[split]
    count = count if scenes is None else scenes
    if count < 1:
        raise ValueError(f"scenes must be at least 1, got {count}")
    random = np.random.default_rng([seed, stream])
    names, parts = [], []
    for number in range(count):
        parts.append(_scene(random))
        name = f"scene-{stream}{number:04d}"
        names.append(Scene(name, tuple(f"{name}-{frame:02d}" for frame in range(FRAMES_PER_SCENE))))
    cells, directions, poses = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    return ToySplit(FramesInMemory(tuple(names), encode(cells, directions), poses), columns_of(cells))


def _scene(random: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float32]]:
    """What is seen in every frame, cells and directions as `encode` takes them ``[F, 12, 12]`` and ``[F, 12, 12, 3]``,
    and how the vehicle moves from each frame to the next ``[F, 2]`` in metres.
    """
    corners = np.argwhere(random.random((BLOCKS, BLOCKS)) < POST_SHARE) * BLOCK
    posts = corners + random.integers(2, 4, size=corners.shape)
    kinds = random.choice([CAR, TRUCK], size=len(posts))
    # The sides of a box, one after the other: three of the four in any order.
    rounds = np.array([random.permutation(len(SIDES))[:ROUND] for _ in posts]).reshape(len(posts), ROUND)
    drives = random.random(FRAMES_PER_SCENE) < DRIVE_SHARE
    driven: NDArray[np.int64] = np.cumsum(drives) - drives
    seen = np.empty((FRAMES_PER_SCENE, SIDE, SIDE), dtype=np.int64)
    directions = np.empty((FRAMES_PER_SCENE, SIDE, SIDE, 3))
    for frame in range(FRAMES_PER_SCENE):
        world = np.full((BLOCK * BLOCKS,) * 2, EMPTY)
        turned = np.broadcast_to([1.0, 0.0, 0.0], (*world.shape, 3)).copy()
        for post, kind, side in zip(posts, kinds, rounds[:, frame % ROUND], strict=True):
            world[tuple(post)] = POST
            cells = _box(post, side)
            world[cells], turned[cells] = kind, _directions(random, world[cells].shape)
        seen[frame] = np.roll(world, -driven[frame], axis=0)[:SIDE, :SIDE]
        directions[frame] = np.roll(turned, -driven[frame], axis=0)[:SIDE, :SIDE]
    poses = np.stack([drives * CELL_METRES, np.zeros(FRAMES_PER_SCENE)], axis=1)
    return seen, directions, poses.astype(np.float32)


def _directions(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Unit vectors ``[*shape, 3]``, every direction alike."""
    points = random.normal(size=(*shape, 3))
    unit: NDArray[np.float64] = points / np.linalg.norm(points, axis=-1, keepdims=True)
    return unit


def _box(post: NDArray[np.int64], side: int) -> tuple[NDArray[np.int64], ...]:
    """The cells of the box at a side of its post, as an index into the world."""
    away, along = np.arange(1, DEEP + 1), np.arange(LONG) - LONG // 2
    spans = [along if step == 0 else step * away for step in SIDES[side]]
    return np.ix_(*((start + span) % (BLOCK * BLOCKS) for start, span in zip(post, spans, strict=True)))


def write_release(folder: Path, seed: int = 0, scenes: dict[str, int] | None = None) -> None:
    """Write both splits as OccFM releases them, whole or not at all; ValueError when the folder exists.

    ``nus_sem_occ_SPLIT.pkl`` holds the latents in an order of its own, ``nuscenes_infos_SPLIT.pkl`` the order in time,
    ``data/nuscenes/gts/SCENE/TOKEN/labels.npz`` the occupancy.
    """
    with whole_folder(folder) as new:
        for split in SPLITS:
            _write_split(new, split, make_split(split, seed, (scenes or {}).get(split)), seed)


def _write_split(folder: Path, split: str, made: ToySplit, seed: int) -> None:
    frames = made.frames
    tokens = [(scene.name, token) for scene in frames.scenes for token in scene.tokens]
    entries = []
    for (scene, token), grid, latent, pose in zip(tokens, made.grids, frames.latents, frames.trajectory, strict=True):
        path = f"data/nuscenes/gts/{scene}/{token}/labels.npz"
        _write_labels(folder / path, grid)
        entries.append({"x_sampled": latent.numpy()[None], "gt_path": [[path]], "gt_trajs": pose.numpy()[None]})
    order = np.random.default_rng([seed, len(SPLITS)]).permutation(len(entries))
    infos = {scene.name: [{"token": token} for token in scene.tokens] for scene in frames.scenes}
    _write_pickle(folder / f"nus_sem_occ_{split}.pkl", [entries[i] for i in order])
    _write_pickle(folder / f"nuscenes_infos_{split}.pkl", {"infos": infos})


def _write_labels(path: Path, grid: Tensor) -> None:
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        np.savez(file, semantics=grid.numpy())


def _write_pickle(path: Path, content: object) -> None:
    """A pickle, because that is the format of the release: this package writes no other, and reads none freely."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(pickle.dumps(content, protocol=4))

    write_file(path, write)
