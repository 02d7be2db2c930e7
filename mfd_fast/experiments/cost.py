"""Cost: seconds and peak memory of a student update with its auxiliary updates, by method (arXiv 2606.11155, table 4).

Neither depends on the values of weights, so that the teacher is a random network and the data are those of the preset.

* Seconds: a distillation of some student updates and one of more; the difference over the number of updates, so that
  start and end of a run are in none. On the CPU these are seconds of the processor; on CUDA of the clock.
* Memory: everything that a short distillation makes, from building the teacher on. On the CPU the bytes of all tensors
  alive at once are counted (`mfd_fast.estimate.tracing.LiveBytes`), neither the interpreter nor what compiled code
  takes inside a call; on CUDA it is the most that torch's allocator had given out.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mfd_fast.config import Settings
from mfd_fast.data import load_dataset
from mfd_fast.data.dataset import Dataset
from mfd_fast.distillation import distill
from mfd_fast.estimate.tracing import LiveBytes
from mfd_fast.experiments.base import Experiment, Result, Results, Work, spread_words
from mfd_fast.methods import METHODS
from mfd_fast.report.theme import Theme, new_figure
from mfd_fast.run_folder import build_from_settings
from mfd_fast.settings_io import load_settings
from mfd_fast.streams import kept_random_state
from mfd_fast.training.context import choose_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20
PAPER = {"mfd": (25, 20), "vsd": (22, 20), "dmd2": (30, 50), "cd": (4, 15)}
"""GPU hours and GB of SANA in the paper, for the rows that it has."""


@dataclass(frozen=True)
class CostSettings:
    """Sizes of the experiment."""

    preset: str = "demo"
    methods: tuple[str, ...] = tuple(METHODS)
    few: int = 5
    """Student updates of the shorter distillation."""
    more: int = 30
    """And of the longer."""
    device: str = "auto"
    texts: tuple[str, ...] = ()
    """More settings, ``key=value``."""


def settings_of(settings: CostSettings, method: str, updates: int, seed: int) -> Settings:
    """The settings of one distillation."""
    texts = [f"distill.method={method}", f"distill.student_updates={updates}", f"run.seed={seed}"]
    texts += [f"run.device={settings.device}", "run.threads=1", "run.tensorboard=false", "distill.sample_every=0"]
    texts += [f"distill.log_every={updates}", "distill.checkpoint_every=0", "distill.compile=off"]
    return load_settings(settings.preset, None, [*settings.texts, *texts])


def run(settings: CostSettings, cell: str, work: Work) -> Result:
    """Seconds and bytes of the method ``cell``."""
    few, more = (settings_of(settings, cell, updates, work.seed) for updates in (settings.few, settings.more))
    dataset = load_dataset(few.data.name, few.data.root, **few.data.options)
    device = choose_device(settings.device, "device")
    peak = peak_bytes(few, dataset)
    times = []
    for chosen in (few, more):
        began = _clock(device)
        _distil(chosen, dataset)
        times.append(_clock(device) - began)
    seconds = (times[1] - times[0]) / (settings.more - settings.few)
    counted = "tensors alive at once" if device.type == "cpu" else "torch's CUDA allocator"
    return {"device": device.type, "counted": counted, "seconds": seconds, "peak_bytes": peak}


def peak_bytes(chosen: Settings, dataset: Dataset) -> int:
    """What two student updates with these settings take."""
    short = replace(chosen.distill, student_updates=2, log_every=2, sample_every=0, checkpoint_every=0, compile="off")
    with peak_memory(choose_device(chosen.run.device, "device")) as peak:
        _distil(replace(chosen, distill=short), dataset)
    return peak[0]


def _distil(chosen: Settings, dataset: Dataset) -> None:
    """The whole run of these settings, from a random teacher."""
    with kept_random_state(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(chosen.run.seed)
        teacher = build_from_settings(chosen, dataset.sample_shape, dataset.num_classes).eval().requires_grad_(False)
        distill(teacher, chosen, dataset, Path(folder) / "run")


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """The list holds the bytes of the peak when the context is left."""
    found: list[int] = []
    if device.type == "cpu":
        with LiveBytes() as memory:
            yield found
        found.append(memory.peak)
        return
    torch.cuda.reset_peak_memory_stats(device)  # pragma: no cover (gpu)
    yield found  # pragma: no cover (gpu)
    found.append(torch.cuda.max_memory_allocated(device))  # pragma: no cover (gpu)


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)  # pragma: no cover (gpu)
    return time.perf_counter()  # pragma: no cover (gpu)


def figure(results: Results, theme: Theme) -> "Figure":
    """Seconds and memory of each method."""
    drawing, axes = new_figure(9.0, 3.2, 2)
    for axis, key, unit, words in zip(
        axes, ("seconds", "peak_bytes"), (1.0, MIB), ("seconds of a student update", "peak memory, MiB"), strict=True
    ):
        means = [sum(run[key] for run in runs) / len(runs) / unit for runs in results.values()]
        axis.bar(range(len(means)), means, color=[theme.student, *[theme.teacher] * (len(means) - 1)])
        axis.set_xticks(range(len(means)), list(results), rotation=45, ha="right")
        axis.set_ylabel(words)
    return drawing


def finding(results: Results) -> str:
    """A line for each method, with the ratio to the first and, where it has the method, the paper's."""
    first = next(iter(results))
    where = results[first][0]
    lines = [
        f"On {where['device']}: seconds of a student update with its auxiliary updates; peak memory "
        f"({where['counted']}); both over those of {first}, and the paper's GPU hours and GB over those of its MFD."
    ]
    for name, runs in results.items():
        values: dict[str, list[float]] = {key: [run[key] for run in runs] for key in ("seconds", "peak_bytes")}
        over = [_mean(results, name, key) / _mean(results, first, key) for key in values]
        paper = [own / base for own, base in zip(PAPER[name], PAPER["mfd"], strict=True)] if name in PAPER else None
        words = f" (paper {paper[0]:.2f}, {paper[1]:.2f})" if paper and first == "mfd" else ""
        memory = spread_words([value / MIB for value in values["peak_bytes"]])
        lines.append(
            f"{name:10} {spread_words(values['seconds'])} s, {memory} MiB; {over[0]:.2f}, {over[1]:.2f}{words}"
        )
    return "\n".join(lines)


def _mean(results: Results, name: str, key: str) -> float:
    values: list[Any] = [run[key] for run in results[name]]
    return float(sum(values) / len(values))


COST = Experiment(
    summary="seconds and peak memory of a student update, by method",
    quick=CostSettings(few=2, more=8),
    full=CostSettings(),
    cells=lambda settings: settings.methods,
    run=run,
    figure=figure,
    finding=finding,
)
