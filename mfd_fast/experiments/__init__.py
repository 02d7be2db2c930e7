"""Experiments behind the claims of Mean Flow Distillation: ``mfd-fast reproduce NAME``.

To add one, write a file with an `Experiment` and add its line to `EXPERIMENTS`.
"""

import importlib
from typing import Any

from mfd_fast.config import did_you_mean
from mfd_fast.experiments.base import Experiment

__all__ = ["EXPERIMENTS", "Experiment", "load_experiment"]

EXPERIMENTS: dict[str, str] = {
    "variance": "mfd_fast.experiments.variance:VARIANCE",
    "no-auxiliary": "mfd_fast.experiments.no_auxiliary:NO_AUXILIARY",
    "jacobian": "mfd_fast.experiments.jacobian:JACOBIAN",
    "low-pass": "mfd_fast.experiments.low_pass:LOW_PASS",
    "bias-noise": "mfd_fast.experiments.bias_noise:BIAS_NOISE",
    "step-size": "mfd_fast.experiments.step_size:STEP_SIZE",
    "vector-field": "mfd_fast.experiments.vector_field:VECTOR_FIELD",
    "auxiliary": "mfd_fast.experiments.auxiliary:AUXILIARY",
    "distance": "mfd_fast.experiments.distance:DISTANCE",
    "healthy": "mfd_fast.experiments.healthy:HEALTHY",
    "cost": "mfd_fast.experiments.cost:COST",
    "table": "mfd_fast.experiments.table:TABLE",
}


def load_experiment(name: str) -> Experiment[Any]:
    """The experiment called ``name``; ValueError names the nearest one."""
    if name not in EXPERIMENTS:
        nearest = did_you_mean(name, tuple(EXPERIMENTS))
        raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}; got {name!r}{nearest}")
    module, attribute = EXPERIMENTS[name].split(":")
    experiment: Experiment[Any] = getattr(importlib.import_module(module), attribute)
    return experiment
