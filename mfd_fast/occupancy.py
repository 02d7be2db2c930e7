"""What forecasts of occupancy are worth: IoU and mIoU of teacher and student by horizon, and pictures from above."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mfd_fast.config import Settings
from mfd_fast.data.occupancy import Decoder, OccupancyDataset
from mfd_fast.data.occupancy.labels import CLASSES, FREE, GroundTruth, LabelFiles
from mfd_fast.metrics.iou import IoUCounter
from mfd_fast.phases import Phases
from mfd_fast.run_folder import RunFolder
from mfd_fast.storage import write_file
from mfd_fast.streams import make_generator, standard_normal
from mfd_fast.student import Student
from mfd_fast.training.distributed import World

ALONE = World()
VIEWS = 4
"""Windows of which pictures are kept."""
VIEWS_FILE = "evaluation/occupancy/views.npz"
RECORDED, REPEATED = "recorded", "repeated"
"""Forecasts to compare with: the recorded latents themselves (what the compressor loses), and the last frame again."""


class Scorer(Protocol):
    """Compares forecasts with what was recorded, batch by batch."""

    def update(self, forecast: Tensor, expected: Tensor) -> None:
        """Count forecast latents ``[b, future, C, H, W]``; ``expected`` is what was recorded of the same windows."""
        ...

    def result(self, world: World) -> dict[str, Any]:
        """What all processes measured together, for JSON; percentages for shares."""
        ...


class OccupancyScorer:
    """IoU and mIoU of decoded forecasts."""

    def __init__(self, dataset: OccupancyDataset, decode: Decoder) -> None:
        self._dataset, self._decode = dataset, decode
        self._counter = IoUCounter(dataset.sample_shape[0], len(CLASSES))

    def update(self, forecast: Tensor, expected: Tensor) -> None:
        """See `Scorer`; ``expected`` are grids uint8 ``[b, future, X, Y, Z]``."""
        grids = self._decode(forecast.flatten(0, 1) / self._dataset.scale).unflatten(0, forecast.shape[:2])
        self._counter.update(grids, expected)

    def result(self, world: World) -> dict[str, Any]:
        """IoU and mIoU by horizon and averaged, IoU by class."""
        self._counter.counts = world.sum(self._counter.counts)
        found = self._counter.result()
        return {
            "iou": [100 * value for value in found.iou],
            "miou": [100 * value for value in found.miou],
            "mean_iou": 100 * found.mean_iou,
            "mean_miou": 100 * found.mean_miou,
            "classes": {name: 100 * value for name, value in zip(CLASSES, found.classes, strict=True)},
        }


class LatentScorer:
    """Root mean square distance to the recorded latents, in training units."""

    def __init__(self, dataset: OccupancyDataset) -> None:
        self._squares = torch.zeros(dataset.sample_shape[0], dtype=torch.float64)
        self._rows = 0

    def update(self, forecast: Tensor, expected: Tensor) -> None:
        """See `Scorer`; ``expected`` are latents like ``forecast``."""
        gap = (forecast - expected).double()
        self._squares += gap.square().flatten(2).mean(2).sum(0)
        self._rows += len(forecast)

    def result(self, world: World) -> dict[str, Any]:
        """The distance by horizon and over all of them."""
        power = world.sum(self._squares) / world.sum(torch.tensor(self._rows))
        return {"latent_rms": power.sqrt().tolist(), "mean_latent_rms": power.mean().sqrt().item()}


def score_forecasts(
    run: RunFolder,
    settings: Settings,
    dataset: OccupancyDataset,
    samplers: Mapping[str, Student],
    decoder: Decoder | None,
    phases: Phases,
    world: World = ALONE,
) -> dict[str, Any]:
    """Measure every sampler on the same held-out windows and noise; the entry of ``metrics.json``.

    Latents are decoded by ``decoder``, else by the data's own codec, and compared with the recorded occupancy of
    ``evaluate.labels`` or of the data; where one of the two is missing, their distance to the recorded latents is
    measured. Windows are spread evenly over the held-out data. Pictures of the first of them go to `VIEWS_FILE`.
    Processes share the batches, and each gets the whole entry; frames per second are those of one process, its first
    batch left out.
    """
    decode = decoder or dataset.decoder
    labels = settings.evaluate.labels
    truth = dataset.truth if labels is None else LabelFiles(Path(labels), dataset.scenes)
    total = len(dataset.held_out_x)
    count = min(settings.evaluate.num_samples or total, total)
    chosen = torch.linspace(0, total - 1, count, dtype=torch.float64).round().long()
    own = list(enumerate(torch.split(chosen, settings.evaluate.batch_size)))[world.rank :: world.size]
    scorers: dict[str, Scorer] = {
        name: OccupancyScorer(dataset, decode) if decode and truth else LatentScorer(dataset)
        for name in (*samplers, RECORDED, REPEATED)
    }
    timings: dict[str, list[tuple[int, float]]] = {name: [] for name in scorers}
    views: dict[str, Tensor] = {}
    for number, rows in tqdm(own, desc="windows", unit="batch", disable=None if world.is_main else True):
        with phases.phase("evaluate"):
            expected = recorded_occupancy(dataset, truth, rows) if decode and truth else dataset.held_out_x[rows]
            if truth and decode and number == 0:
                views["truth"] = from_above(expected[:VIEWS].flatten(0, 1))
        for name, forecast, seconds in _forecasts(dataset, samplers, rows, number, settings.run.seed, phases):
            timings[name].append((len(rows) * dataset.sample_shape[0], seconds))
            with phases.phase("evaluate"):
                scorers[name].update(forecast, expected)
                if decode is not None and number == 0:
                    views[name] = from_above(decode(forecast[:VIEWS].flatten(0, 1) / dataset.scale))
    table = [_row(name, timings[name], scorer.result(world)) for name, scorer in scorers.items()]
    if views:
        _write_views(run, {name: view.unflatten(0, (-1, dataset.sample_shape[0])) for name, view in views.items()})
    scored = "occupancy" if decode and truth else "latents"
    entry = {"scored": scored, "windows": count, "batch_size": settings.evaluate.batch_size, "rows": table}
    return {"occupancy": entry, "seed": settings.run.seed}


def _forecasts(
    dataset: OccupancyDataset, samplers: Mapping[str, Student], rows: Tensor, number: int, seed: int, phases: Phases
) -> Iterator[tuple[str, Tensor, float]]:
    """Of every sampler, and of `RECORDED` and `REPEATED`: the name, latents ``[b, future, C, H, W]`` on the CPU for the
    held-out samples ``rows``, which are batch ``number``, and the seconds they took.
    """
    with phases.phase("sample"):
        condition = {name: values[rows] for name, values in dataset.held_out_conditions.items()}
        noise = standard_normal((len(rows), *dataset.sample_shape), make_generator(seed, "evaluate/noise", number))
    for name, sampler in samplers.items():
        with phases.phase("sample"):
            start = time.perf_counter()
            on_device = {key: value.to(sampler.device) for key, value in condition.items()}
            forecast = sampler.generate(noise.to(sampler.device), on_device).cpu()
            seconds = time.perf_counter() - start
        yield name, forecast, seconds
    yield RECORDED, dataset.held_out_x[rows], 0.0
    yield REPEATED, condition["history"][:, -1:].expand(-1, dataset.sample_shape[0], -1, -1, -1), 0.0


def _row(name: str, timings: Sequence[tuple[int, float]], result: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the table; ``timings`` are frames and seconds of batches, of which the first one warms up."""
    role, _, steps = name.partition("-")
    timed = timings[1:] or timings
    seconds = sum(spent for _, spent in timed)
    speed = sum(frames for frames, _ in timed) / seconds if seconds else None
    return {"role": role, "steps": int(steps) if steps else None, "frames_per_second": speed, **result}


def recorded_occupancy(dataset: OccupancyDataset, truth: GroundTruth, rows: Tensor) -> Tensor:
    """The recorded grids of the future of held-out samples, uint8 ``[b, future, X, Y, Z]``."""
    future = dataset.sample_shape[0]
    return torch.stack([truth.labels(start, future) for start in dataset.truth_starts[rows].tolist()])


def from_above(grids: Tensor) -> Tensor:
    """The label of the highest filled voxel of every column, `FREE` without one: ``[n, X, Y, Z]`` to ``[n, X, Y]``."""
    top = grids.shape[-1] - 1 - (grids != FREE).flip(-1).int().argmax(-1, keepdim=True)
    return grids.gather(-1, top).squeeze(-1)


def _write_views(run: RunFolder, views: Mapping[str, Tensor]) -> None:
    """Write bird's-eye views ``[windows, future, X, Y]`` uint8 by name."""
    arrays: dict[str, Any] = {name: view.cpu().numpy().astype(np.uint8) for name, view in views.items()}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    write_file(run.path / VIEWS_FILE, write)
