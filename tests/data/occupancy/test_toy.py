"""The toy set: its codec, its law, and that files and memory hold the same."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mfd_fast.data import load_dataset
from mfd_fast.data.dataset import all_rows
from mfd_fast.data.occupancy import OccupancyDataset, codec, toy
from mfd_fast.data.occupancy.convert import convert
from mfd_fast.data.occupancy.labels import CLASSES, FREE, LabelFiles, read_labels
from mfd_fast.data.occupancy.store import Scene

FEW = {"training": 3, "validation": 2}


def cells(grids: torch.Tensor) -> np.ndarray:
    """The number of what is in every cell of grids ``[n, 24, 24, 4]``."""
    ground = grids[:, ::2, ::2, 0]
    numbers = torch.full(ground.shape, codec.EMPTY)
    for number, kind in enumerate(codec.KINDS):
        numbers[ground == kind.label] = number
    return numbers.numpy()


def test_codec_is_exact_and_stable() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 4, (5, 12, 12), generator=generator)
    directions = torch.nn.functional.normalize(torch.randn((*kinds.shape, 3), generator=generator), dim=-1)
    grids, latents = codec.columns_of(kinds), codec.encode(kinds, directions)
    assert grids.shape == (5, 24, 24, 4)
    assert latents.shape == (5, 4, 12, 12)
    radius = latents[:, :3].norm(dim=1)
    torch.testing.assert_close(radius, torch.where(kinds == codec.EMPTY, 0.0, codec.RADIUS))
    assert not latents.movedim(1, 3)[kinds == codec.EMPTY].any()
    assert torch.equal(codec.decode(latents), grids)
    shaken = latents + 0.028 * (2 * torch.rand(latents.shape, generator=generator) - 1)
    assert torch.equal(codec.decode(shaken), grids)
    columns = {label: int((grids[grids[..., 0] == label] != FREE).sum(-1).max()) for label in (4, 10, 15)}
    assert columns == {CLASSES.index("car"): 2, CLASSES.index("truck"): 3, CLASSES.index("manmade"): 4}


def test_directions_mean_nothing_and_their_mean_is_empty() -> None:
    kinds = torch.randint(0, 3, (4, 12, 12), generator=torch.Generator().manual_seed(0))
    turned = [codec.encode(kinds, axis.expand(*kinds.shape, 3)) for axis in torch.eye(3)]
    turned += [codec.encode(kinds, -axis.expand(*kinds.shape, 3)) for axis in torch.eye(3)]
    assert all(torch.equal(codec.decode(latents), codec.columns_of(kinds)) for latents in turned)
    assert (codec.decode(torch.stack(turned).mean(0)) == FREE).all()


@pytest.fixture(scope="module")
def world() -> tuple[np.ndarray, np.ndarray]:
    """Cells ``[200, 12, 12, 12]`` of 200 scenes, and after which frames the vehicle drives on."""
    split = toy.make_split("training", seed=3, scenes=200)
    assert split.frames.latents.shape == (200 * 12, 4, 12, 12)
    pace = split.frames.trajectory.reshape(200, 12, 2)
    assert not pace[..., 1].any()
    assert sorted(pace[..., 0].unique().tolist()) == [0.0, pytest.approx(toy.CELL_METRES)]
    return cells(split.grids).reshape(200, 12, 12, 12), (pace[..., 0] > 0).numpy()


def test_posts_stand_still_and_the_vehicle_drives(world: tuple[np.ndarray, np.ndarray]) -> None:
    seen, drives = world
    for scene, moved in zip(seen == toy.POST, drives, strict=True):
        for before, after, step in zip(scene[:-1], scene[1:], moved.astype(int), strict=False):
            # A cell that shows a post shows it again where the drive has moved it to.
            assert (before[step:] == after[: 12 - step]).all()
    assert drives.mean() == pytest.approx(toy.DRIVE_SHARE, abs=0.01)
    # Seven cells of a post and its box on 36, and nothing overlaps.
    assert (seen != codec.EMPTY).mean() == pytest.approx(toy.POST_SHARE * 7 / 36, abs=0.01)


def test_boxes_go_round_three_sides(world: tuple[np.ndarray, np.ndarray]) -> None:
    seen, drives = world

    def side(frame: np.ndarray, x: int, y: int) -> int:
        beside = [int(frame[x + step_x, y + step_y]) for step_x, step_y in toy.SIDES]
        (found,) = [number for number, kind in enumerate(beside) if kind in (toy.CAR, toy.TRUCK)]
        return found

    rounds = set()
    for scene in seen[~drives.any(1)]:
        for x, y in np.argwhere(scene[0, 1:-1, 1:-1] == toy.POST) + 1:
            sides = [side(frame, x, y) for frame in scene]
            assert sides == sides[:3] * 4
            assert len(set(sides)) == 3
            rounds.add(tuple(sides[:3]))
    assert len(rounds) == 24


def test_directions_of_cells_are_drawn_at_every_frame() -> None:
    split = toy.make_split("training", seed=5, scenes=100)
    seen, point = cells(split.grids), split.frames.latents[:, :3].movedim(1, 3) / codec.RADIUS
    posts, boxes = (torch.from_numpy(np.isin(seen, kinds)) for kinds in ([toy.POST], [toy.CAR, toy.TRUCK]))
    assert point[posts].unique(dim=0).tolist() == [[1.0, 0.0, 0.0]]
    # Points spread evenly over a sphere have a third of their power along each axis and none across two.
    assert point[boxes].mean(0).tolist() == pytest.approx([0, 0, 0], abs=0.05)
    torch.testing.assert_close(point[boxes].T.cov(), torch.eye(3) / 3, atol=0.02, rtol=0)
    # A direction for each cell of a box, in each frame.
    assert len(point[boxes].unique(dim=0)) > 0.99 * int(boxes.sum())


def test_splits_and_seeds_differ() -> None:
    first = toy.make_split("training", 0, 2).frames.latents
    assert torch.equal(first, toy.make_split("training", 0, 2).frames.latents)
    assert torch.equal(first, toy.make_split("training", 0, 3).frames.latents[: len(first)])
    assert not torch.equal(first, toy.make_split("training", 1, 2).frames.latents)
    assert not torch.equal(first, toy.make_split("validation", 0, 2).frames.latents)
    with pytest.raises(ValueError, match="split must be one of training, validation, got 'test'"):
        toy.make_split("test")
    with pytest.raises(ValueError, match="scenes must be at least 1, got 0"):
        toy.make_split("training", 0, 0)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release of a few scenes, and its conversion beside it."""
    folder = tmp_path_factory.mktemp("toy")
    toy.write_release(folder / "release", 0, FEW)
    for split in FEW:
        paths = [folder / "release" / name for name in (f"nus_sem_occ_{split}.pkl", f"nuscenes_infos_{split}.pkl")]
        convert(*paths, folder / "latents" / split)
    return folder


def test_files_and_memory_hold_the_same(converted: Path) -> None:
    on_disk = load_dataset("occupancy-toy", converted / "latents")
    in_memory = load_dataset("occupancy-toy", training_scenes=3, validation_scenes=2)
    assert isinstance(on_disk, OccupancyDataset)
    assert isinstance(in_memory, OccupancyDataset)
    assert torch.equal(all_rows(on_disk.x), all_rows(in_memory.x))
    assert torch.equal(all_rows(on_disk.held_out_x), all_rows(in_memory.held_out_x))
    for name in ("history", "trajectory"):
        assert torch.equal(all_rows(on_disk.conditions[name]), all_rows(in_memory.conditions[name]))
        assert torch.equal(all_rows(on_disk.held_out_conditions[name]), all_rows(in_memory.held_out_conditions[name]))
    assert on_disk.truth is None
    assert in_memory.truth is not None
    assert on_disk.scenes == in_memory.scenes
    files = LabelFiles(converted / "release" / "data" / "nuscenes" / "gts", on_disk.scenes)
    assert torch.equal(files.labels(12, 12), in_memory.truth.labels(12, 12))


def test_recorded_latents_decode_to_the_recorded_occupancy(converted: Path) -> None:
    data = load_dataset("occupancy-toy", converted / "latents")
    assert isinstance(data, OccupancyDataset)
    assert data.decoder is not None
    truth = LabelFiles(converted / "release" / "data" / "nuscenes" / "gts", data.scenes)
    assert len(data.held_out_x) == 2 * (12 - 6 + 1)
    for row in (0, 6, 7, 13):
        decoded = data.decoder(data.held_out_x[torch.tensor([row])][0] / data.scale)
        assert torch.equal(decoded, truth.labels(int(data.truth_starts[row]), 3))


def test_the_same_files_as_a_dataset_without_codec(converted: Path) -> None:
    options = {"history": 2, "future": 4, "history_last": 1, "rescale": 1.0}
    data = load_dataset("occupancy", converted / "latents", channels=4, **options)
    assert isinstance(data, OccupancyDataset)
    assert data.sample_shape == (4, 4, 12, 12)
    assert data.conditions["history"].shape[1:] == (2, 4, 12, 12)
    assert data.decoder is None
    assert data.truth is None
    assert not data.conditions["history"][torch.tensor([0])][:, 0].any()
    assert not data.conditions["trajectory"][torch.arange(len(data.x))][:, 0].any()
    assert data.x[torch.tensor([0])].abs().max().item() == pytest.approx(codec.RADIUS)
    with pytest.raises(ValueError, match=r"channels: expected latents of 64, those in .*latents have 4"):
        load_dataset("occupancy", converted / "latents", channels=64, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("occupancy", {}, "root: dataset 'occupancy' is read from a converted folder"),
        ("occupancy-toy", {"future": 0}, "history, future and rescale must be positive"),
        ("occupancy-toy", {"history_last": 4}, "history_last from 1 to history"),
        ("occupancy-toy", {"rescale": 0.0}, "rescale must be positive"),
        ("occupancy-toy", {"future": 10, "training_scenes": 2}, "no training scene has the 13 frames of a window"),
    ],
)
def test_options_that_do_not_fit(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(name, **options)


def test_release_is_never_overwritten(converted: Path) -> None:
    with pytest.raises(ValueError, match="release exists already"):
        toy.write_release(converted / "release")


def test_label_files(tmp_path: Path) -> None:
    path = tmp_path / "scene" / "token" / "labels.npz"
    path.parent.mkdir(parents=True)
    grid = np.random.default_rng(0).integers(0, 18, (4, 5, 2)).astype(np.uint8)
    np.savez(path, semantics=grid, mask_camera=grid)
    assert read_labels(path).tolist() == grid.tolist()
    files = LabelFiles(tmp_path, [Scene("scene", ("token",))])
    assert files.labels(0, 1).shape == (1, 4, 5, 2)
    with pytest.raises(FileNotFoundError, match=r"labels: 2 of 3 files are missing in .*, the first is .*lost"):
        LabelFiles(tmp_path, [Scene("scene", ("token", "lost", "gone"))])
    with pytest.raises(FileNotFoundError, match=r"labels: there is no file .*lost"):
        read_labels(tmp_path / "lost")
    with pytest.raises(NotADirectoryError, match="labels: expected the folder that holds SCENE/TOKEN"):
        LabelFiles(tmp_path / "nowhere", [])
    for content, message in (({"semantics": grid.astype(int)}, "got int64"), ({"semantics": grid + 1}, "up to 18"),
                             ({"other": grid}, "holds no 'semantics'")):  # fmt: skip
        np.savez(path, **content)
        with pytest.raises(ValueError, match=message):
            read_labels(path)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="is not a readable npz file"):
        read_labels(path)
