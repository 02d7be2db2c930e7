"""Scoring of forecasts, and the whole way on the toy set: teacher, student, IoU, report."""

import contextlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mfd_fast.config import Settings
from mfd_fast.data import load_dataset
from mfd_fast.data.dataset import all_rows
from mfd_fast.data.occupancy import OccupancyDataset, codec
from mfd_fast.data.occupancy.labels import FREE
from mfd_fast.metrics.iou import IoUCounter
from mfd_fast.occupancy import VIEWS_FILE, LatentScorer, from_above, score_forecasts
from mfd_fast.phases import Phases
from mfd_fast.run_folder import RunFolder
from mfd_fast.settings_io import load_settings
from mfd_fast.student import Student
from mfd_fast.training.distributed import World


@pytest.fixture(scope="module")
def toy() -> OccupancyDataset:
    data = load_dataset("occupancy-toy", training_scenes=2, validation_scenes=2)
    assert isinstance(data, OccupancyDataset)
    return data


def settings(*overrides: str) -> Settings:
    return load_settings("occfm-toy", overrides=["run.device=cpu", "evaluate.batch_size=4", *overrides])


def knowing_field(toy: OccupancyDataset, right: float) -> Callable[..., Tensor]:
    """A field whose one step from noise ends in the recorded future for a share of the windows, else in nothing."""
    known = all_rows(toy.held_out_conditions["history"]).flatten(1)
    futures = all_rows(toy.held_out_x)

    def field(x: Tensor, t: Tensor, *, history: Tensor, trajectory: Tensor) -> Tensor:
        rows = torch.cdist(history.flatten(1), known).argmin(1)
        wanted = futures[rows]
        wanted[rows >= right * len(known)] = 0.0
        return (x - wanted) / t.view(-1, 1, 1, 1, 1)

    return field


def scored(
    toy: OccupancyDataset, tmp_path: Path, right: float, *overrides: str, **changes: Any
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    sampler = Student(knowing_field(toy, right), toy.sample_shape)
    arguments = {"decoder": None, "phases": Phases(), **changes}
    found = score_forecasts(RunFolder(tmp_path), settings(*overrides), toy, {"student-1": sampler}, **arguments)
    return found["occupancy"], {row["role"]: row for row in found["occupancy"]["rows"]}


def test_iou_of_known_forecasts(toy: OccupancyDataset, tmp_path: Path) -> None:
    entry, rows = scored(toy, tmp_path, 1.0)
    assert (entry["scored"], entry["windows"], entry["batch_size"]) == ("occupancy", 14, 4)
    assert rows["student"]["mean_iou"] == rows["recorded"]["mean_iou"] == pytest.approx(100)
    assert rows["student"]["iou"] == pytest.approx([100] * 3)
    assert rows["student"]["frames_per_second"] > 0
    assert rows["recorded"]["frames_per_second"] is None
    assert 0 < rows["repeated"]["mean_iou"] < 90
    half = scored(toy, tmp_path, 0.5)[1]["student"]
    # Seven of fourteen windows are right and the others claim nothing: the share of filled voxels that was claimed.
    assert toy.truth is not None
    grids = torch.stack([toy.truth.labels(start, 3) for start in toy.truth_starts.tolist()])
    filled = (grids != FREE).double().flatten(2).sum(2)  # [window, horizon]
    assert half["iou"] == pytest.approx((100 * filled[:7].sum(0) / filled.sum(0)).tolist())
    assert half["classes"]["car"] < 100
    assert half["classes"]["bus"] == 100  # never there


def test_repeated_is_the_last_frame_of_the_history(tmp_path: Path) -> None:
    data = load_dataset("occupancy-toy", history=2, history_last=2, training_scenes=1, validation_scenes=2)
    assert isinstance(data, OccupancyDataset)
    assert data.truth is not None
    row = scored(data, tmp_path, 1.0)[1]["repeated"]
    counters = [IoUCounter(3, 17) for _ in range(2)]
    for start in data.truth_starts.tolist():
        for back, counter in enumerate(counters, start=1):
            shown = data.truth.labels(start - back, 1).expand(3, -1, -1, -1)
            counter.update(shown[None], data.truth.labels(start, 3)[None])
    last, before = (100 * counter.result().mean_iou for counter in counters)
    assert row["mean_iou"] == pytest.approx(last)
    assert abs(last - before) > 0.1


def test_fewer_windows_are_spread_evenly(toy: OccupancyDataset, tmp_path: Path) -> None:
    asked: list[Tensor] = []

    class Watched:
        def labels(self, first: int, count: int) -> Tensor:
            asked.append(torch.tensor([first]))
            return toy.truth.labels(first, count)  # type: ignore[union-attr]

    import dataclasses

    watched = dataclasses.replace(toy, truth=Watched())
    entry, _ = scored(watched, tmp_path, 1.0, "evaluate.num_samples=3")
    assert entry["windows"] == 3
    # Once for all samplers: a grid of nuScenes takes as long to read as a sampler's step.
    assert [int(first) for first in asked] == toy.truth_starts[torch.tensor([0, 6, 13])].tolist()
    assert scored(toy, tmp_path, 1.0, "evaluate.num_samples=99")[0]["windows"] == 14


def test_without_decoder_latents_are_compared(toy: OccupancyDataset, tmp_path: Path) -> None:
    import dataclasses

    blind = dataclasses.replace(toy, decoder=None)
    entry, rows = scored(blind, tmp_path / "a", 0.5)
    assert entry["scored"] == "latents"
    futures = all_rows(toy.held_out_x)
    gap = futures[7:].square().double().mean((2, 3, 4)).sum(0) / 14
    assert rows["student"]["latent_rms"] == pytest.approx(gap.sqrt().tolist())
    assert rows["student"]["mean_latent_rms"] == pytest.approx(math.sqrt(gap.mean().item()))
    assert rows["recorded"]["mean_latent_rms"] == 0
    assert not (tmp_path / "a" / VIEWS_FILE).exists()
    # A decoder of the user's own serves in its place.
    assert scored(blind, tmp_path / "b", 1.0, decoder=codec.decode)[0]["scored"] == "occupancy"


def test_distances_of_several_processes_add_up(toy: OccupancyDataset) -> None:
    """Squares and rows of all are added, whoever had more windows."""
    whole, *parts = (LatentScorer(toy) for _ in range(3))
    for scorer, rows in ((whole, [0, 1, 2]), (parts[0], [0, 1]), (parts[1], [2])):
        scorer.update(torch.zeros(len(rows), *toy.sample_shape), toy.held_out_x[torch.tensor(rows)])

    class Two(World):
        def sum(self, values: Tensor) -> Tensor:
            return values + {0: parts[1]._rows, 1: parts[1]._squares}[values.dim()]

    assert parts[0].result(Two())["latent_rms"] == pytest.approx(whole.result(World())["latent_rms"], rel=1e-12)


def test_views_from_above(toy: OccupancyDataset, tmp_path: Path) -> None:
    grid = torch.full((1, 2, 1, 3), FREE, dtype=torch.uint8)
    grid[0, 0, 0, :2] = torch.tensor([4, 10])
    assert from_above(grid).tolist() == [[[10], [FREE]]]
    scored(toy, tmp_path, 1.0)
    with np.load(tmp_path / VIEWS_FILE, allow_pickle=False) as views:
        assert sorted(views.files) == ["recorded", "repeated", "student-1", "truth"]
        assert views["truth"].shape == (4, 3, 24, 24)
        np.testing.assert_array_equal(views["truth"], views["student-1"])
        assert (views["truth"] != views["repeated"]).any()


def test_the_same_noise_for_every_sampler(toy: OccupancyDataset, tmp_path: Path) -> None:
    seen: dict[str, list[Tensor]] = {"a": [], "b": []}

    def field_of(name: str) -> Callable[..., Tensor]:
        def field(x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
            seen[name].append(x.clone())
            return x

        return field

    samplers = {f"teacher-{i}": Student(field_of(name), toy.sample_shape) for i, name in ((1, "a"), (2, "b"))}
    score_forecasts(RunFolder(tmp_path), settings(), toy, samplers, None, Phases())
    assert torch.equal(torch.cat(seen["a"]), torch.cat(seen["b"]))
    assert len(torch.cat(seen["a"]).unique()) > 0.99 * torch.cat(seen["a"]).numel()


@pytest.mark.parametrize(("batch_size", "batches"), [(14, [(14, 0.5)]), (5, [(5, 0.9), (5, 0.1), (4, 0.1)])])
def test_the_first_batch_is_not_timed_where_there_are_others(
    batch_size: int, batches: list[tuple[int, float]], toy: OccupancyDataset, tmp_path: Path, monkeypatch: Any
) -> None:
    clock = itertools.accumulate(step for _, spent in batches for step in (0.0, spent))
    monkeypatch.setattr("mfd_fast.occupancy.time.perf_counter", lambda: next(clock))
    phases = Phases()
    monkeypatch.setattr(phases, "phase", lambda name: contextlib.nullcontext())
    _, rows = scored(toy, tmp_path, 1.0, f"evaluate.batch_size={batch_size}", phases=phases)
    timed = batches[1:] or batches
    expected = 3 * sum(windows for windows, _ in timed) / sum(spent for _, spent in timed)
    assert rows["student"]["frames_per_second"] == pytest.approx(expected)
