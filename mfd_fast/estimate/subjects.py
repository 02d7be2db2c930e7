"""The network that settings describe, for an estimate."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfd_fast.config import Settings
from mfd_fast.data import load_dataset
from mfd_fast.estimate.network import Network, sana_1600m, traced
from mfd_fast.models import build_model

Shape = tuple[tuple[int, ...], int | None]
"""Of a sample, and the classes."""
KNOWN_SHAPES: dict[str, Callable[[dict[str, Any]], Shape]] = {
    "occupancy": lambda options: ((options.get("future", 6), options.get("channels") or 16, 50, 50), None),
    "cifar10": lambda options: ((3, 32, 32), 10 if options.get("conditional", True) else None),
}
"""What data that may not be there yet have, by their options."""


def describe_network(settings: Settings, *, lora: bool, precision: str) -> Network:
    """The network of a run.

    Raises:
        ValueError: a model or data that do not exist.
    """
    distill = settings.distill
    if settings.model.name == "sana":
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
    known = KNOWN_SHAPES.get(data.name)
    try:
        if known is None or data.root is not None:
            dataset = load_dataset(data.name, data.root, **data.options)
            return dataset.sample_shape, dataset.num_classes, ""
    except (FileNotFoundError, NotADirectoryError):
        if known is None:
            raise
    shape, classes = known(data.options)
    return shape, classes, f"; the data are not there, samples of {list(shape)} were taken"
