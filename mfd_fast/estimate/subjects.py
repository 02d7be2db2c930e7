"""The networks of an estimate by name, and those of settings."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfd_fast.config import Settings
from mfd_fast.data import load_dataset
from mfd_fast.estimate.network import Network, sana_1600m, traced
from mfd_fast.models import build_model
from mfd_fast.presets import PRESETS
from mfd_fast.settings_io import load_settings

KNOWN_SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "occupancy": ((6, 16, 50, 50), None),
    "cifar10": ((3, 32, 32), 10),
}
"""Sample shape and classes of data that may not be there yet."""

# The paper's settings, for as long as there is no preset of this name.
# fmt: off
_SANA_SETTINGS = (
    "distill.batch_size=1",         "distill.precision=bfloat16",       "distill.student_steps=4",
    "distill.guidance_scale=4.5",   "distill.rollout.step_size=0.03",   "distill.roles=lora",
    "distill.lora_rank=64",         "distill.sample_rows=8",            "distill.ema_decay=0",
)
# fmt: on


def subject_settings(name: str, file: Path | None, overrides: list[str]) -> Settings:
    """The settings of a subject of the command line, a file and ``KEY=VALUE`` over them."""
    if name in PRESETS:
        return load_settings(name, file, overrides)
    return load_settings(None, file, [*_SANA_SETTINGS, *overrides])


def describe_network(settings: Settings, *, sana: bool, lora: bool, precision: str) -> Network:
    """The network of a run; ``sana`` for SANA 1.6B whatever the settings' model.

    Raises:
        ValueError: a model or data that do not exist.
    """
    distill = settings.distill
    if sana or settings.model.name == "sana":
        return sana_1600m(precision, distill.lora_rank)
    shape, classes, note = _shape(settings)

    def build() -> torch.nn.Module:
        return build_model(settings.model.name, shape, classes, **settings.model.options)

    def inputs(rows: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        x = torch.zeros(rows, *shape)
        condition: dict[str, Any] = {}
        if classes is not None:
            condition["label"] = torch.zeros(rows, dtype=torch.int64)
        if settings.model.name == "occfm":
            frames = shape[0] + int(settings.data.options.get("history", shape[0]))  # type: ignore[arg-type]
            condition = {"history": x.new_zeros(rows, frames - shape[0], *shape[1:])}
            condition["trajectory"] = x.new_zeros(rows, frames, 2)
        return x, torch.ones(rows), condition

    targets = distill.lora_targets or None
    network = traced(settings.model.name, build, inputs, precision, rank=distill.lora_rank, targets=targets, lora=lora)
    return network._replace(note=f"{network.note}{note}")


def _shape(settings: Settings) -> tuple[tuple[int, ...], int | None, str]:
    data = settings.data
    try:
        dataset = load_dataset(data.name, data.root, **data.options)
    except (FileNotFoundError, NotADirectoryError):
        if data.name not in KNOWN_SHAPES:
            raise
        shape, classes = KNOWN_SHAPES[data.name]
        return shape, classes, f"; the data are not there, samples of {list(shape)} were taken"
    return dataset.sample_shape, dataset.num_classes, ""
