"""What a student learns to generate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mfd_fast.data.dataset import Dataset, NoSamples
from mfd_fast.models import null_condition
from mfd_fast.types import Rows


@dataclass(frozen=True)
class Preview:
    """Samples to look at."""

    conditions: Mapping[str, Rows]
    """Rows to sample for, always with the same noise."""
    decode: Callable[[Tensor], Tensor]
    """Pictures ``[N, 3, H, W]`` in [-1, 1] from samples; what it needs it loads and lets go."""


@dataclass(frozen=True)
class Task:
    """What the student learns to generate, apart from the teacher itself."""

    sample_shape: tuple[int, ...]
    """Shape of one sample."""
    conditions: Mapping[str, Rows]
    """Condition rows to draw from, leading dimension N, on the CPU; empty for an unconditional teacher."""
    negative_condition: Mapping[str, Tensor] | None = None
    """What guidance pushes away from, leading dimension 1."""
    label_counts: tuple[int, ...] | None = None
    """How often each label occurs, for class-conditional teachers."""
    value_range: tuple[float, float] | None = None
    """Smallest and largest value of a picture; None for other data."""
    samples: Rows | None = None
    """Real samples ``[N, *sample_shape]`` beside the condition rows, for methods that need data."""
    preview: Preview | None = None
    """What is looked at, where samples are no pictures."""

    @property
    def needed_conditions(self) -> tuple[str, ...]:
        """Names of the conditions that a student cannot draw for itself, as it draws labels."""
        return tuple(name for name in self.conditions if name != "label" or self.label_counts is None)

    @classmethod
    def from_dataset(cls, dataset: Dataset, teacher: nn.Module) -> "Task":
        """The task of a data set; its conditions are all used, its labels if the teacher has classes."""
        negative = dataset.negative_condition or null_condition(teacher)
        label = dataset.label if negative is not None and "label" in negative else None
        counts = None if label is None else tuple(torch.bincount(label, minlength=dataset.num_classes or 0).tolist())
        return cls(
            dataset.sample_shape,
            dict(dataset.conditions) if label is None else {**dataset.conditions, "label": label},
            None if negative is None else {name: value.cpu() for name, value in negative.items()},
            counts,
            dataset.value_range,
            None if isinstance(dataset.x, NoSamples) else dataset.x,
        )
