"""Velocity networks by name: `build_model` makes one, `describe_model` says in JSON how to make it again."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mfd_fast.models.base import VelocityNetwork
from mfd_fast.models.options import check_options, nearest

MODELS: dict[str, str] = {
    "mlp": "mfd_fast.models.mlp:MLP",
    "dit": "mfd_fast.models.dit:DiT",
    "unet": "mfd_fast.models.unet:UNet",
    "occfm": "mfd_fast.models.occfm.velocity:OccupancyVelocity",
}
"""Name of a model to ``"module:Class"``, imported when it is first built."""


def model_class(name: str) -> type[VelocityNetwork]:
    """The class of the model called ``name``; ValueError with the nearest valid name when there is none."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}{nearest(name, MODELS)}")
    module, _, attribute = MODELS[name].partition(":")
    found: type[VelocityNetwork] = getattr(importlib.import_module(module), attribute)
    return found


def build_model(
    name: str, sample_shape: Sequence[int], num_classes: int | None = None, **options: Any
) -> VelocityNetwork:
    """A new model of ``MODELS`` for samples of ``sample_shape``.

    Raises:
        ValueError: unknown name or option (the message names the nearest valid one), or a value of the wrong type.
    """
    model = model_class(name)
    check_options(name, model, options)
    return model(sample_shape, num_classes, **options)


def describe_model(model: VelocityNetwork) -> dict[str, Any]:
    """How to build ``model`` again, without its weights: a dict that JSON can hold.

    Raises:
        ValueError: the class of ``model`` is not in ``MODELS``.
    """
    path = f"{type(model).__module__}:{type(model).__qualname__}"
    for name, known in MODELS.items():
        if known == path:
            return {
                "model": name,
                "sample_shape": list(model.sample_shape),
                "num_classes": model.num_classes,
                "options": dict(model.options),
            }
    raise ValueError(f"{path} is not one of MODELS ({', '.join(MODELS)}), so it cannot be described by name")


def model_from_description(description: Mapping[str, Any]) -> VelocityNetwork:
    """A new model from what `describe_model` returned; keys it does not know are left to the caller.

    Raises:
        ValueError: a key is missing, or `build_model` refuses the values.
    """
    missing = [key for key in ("model", "sample_shape", "num_classes", "options") if key not in description]
    if missing:
        raise ValueError(f"the description of a model lacks {', '.join(missing)}; it has {', '.join(description)}")
    return build_model(
        description["model"], description["sample_shape"], description["num_classes"], **description["options"]
    )


def null_condition(model: Any) -> dict[str, Tensor] | None:
    """What guidance pushes away from: the model's own ``null_condition()`` where it has one, else "no label".

    No label is ``{"label": [num_classes]}``, int64 ``[1]``, shared by all rows, on the device of the model's
    parameters. None for a field without classes.
    """
    own = getattr(model, "null_condition", None)
    if callable(own):
        return dict(own())
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:
        return None
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    first = next(parameters, None)
    return {"label": torch.tensor([num_classes], device=None if first is None else first.device)}
