"""What every dataset of this package is once it has been read."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfd_fast.types import Rows, VelocityField


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples for training and, apart from them, samples that are never trained on.

    Raises ValueError or TypeError when the parts do not fit together.
    """

    name: str
    x: Rows
    """``[N, *sample_shape]`` float32: the training samples."""
    label: Tensor | None
    """``[N]`` int64 in ``[0, num_classes)``, or None for data without classes."""
    held_out_x: Rows
    """``[M, *sample_shape]`` float32: samples kept apart."""
    held_out_label: Tensor | None
    """``[M]`` int64, or None."""
    num_classes: int | None = None
    value_range: tuple[float, float] | None = None
    """The smallest and largest possible value of a picture; None for points."""
    teacher: VelocityField | None = None
    """The exact marginal velocity of this law, where it is known in closed form."""
    conditions: Mapping[str, Rows] = field(default_factory=dict)
    """Conditions of the training samples besides their labels, by name, each with N rows."""
    held_out_conditions: Mapping[str, Rows] = field(default_factory=dict)
    """The same for the held-out samples, with M rows."""
    negative_condition: Mapping[str, Tensor] | None = None
    """What guidance pushes away from, leading dimension 1, where that comes with the data (an empty prompt)."""

    def __post_init__(self) -> None:
        _check_samples("x", self.x)
        _check_samples("held_out_x", self.held_out_x)
        if self.x.shape[1:] != self.held_out_x.shape[1:]:
            raise ValueError(
                f"held_out_x: expected samples of shape {self.sample_shape}, got {tuple(self.held_out_x.shape[1:])}"
            )
        _check_labels("label", self.label, len(self.x), self.num_classes)
        _check_labels("held_out_label", self.held_out_label, len(self.held_out_x), self.num_classes)
        _check_conditions("conditions", self.conditions, len(self.x))
        _check_conditions("held_out_conditions", self.held_out_conditions, len(self.held_out_x))
        if self.conditions.keys() != self.held_out_conditions.keys():
            raise ValueError(
                f"held_out_conditions: expected the names of conditions ({', '.join(self.conditions) or 'none'}), got "
                f"{', '.join(self.held_out_conditions) or 'none'}"
            )

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.x.shape[1:])


@dataclass(frozen=True)
class NoSamples:
    """In place of samples where data are conditions alone: it has a shape, and nothing to read."""

    shape: tuple[int, ...]
    """``(N, *sample_shape)``."""
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor, /) -> Tensor:
        raise ValueError("these data are conditions without samples: there is nothing to read or to compare with")


def all_rows(rows: Rows) -> Tensor:
    """Every row as one tensor in memory."""
    return rows if isinstance(rows, Tensor) else rows[torch.arange(len(rows))]


def _check_samples(argument: str, x: Rows) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"{argument}: expected float32, got {x.dtype}")
    if len(x.shape) < 2 or len(x) == 0:
        raise ValueError(f"{argument}: expected shape [N, ...] with N > 0, got {tuple(x.shape)}")


def _check_labels(argument: str, label: Tensor | None, rows: int, num_classes: int | None) -> None:
    if label is None or num_classes is None:
        if label is not None or num_classes is not None:
            raise ValueError(
                f"{argument}: labels and num_classes come together, got "
                f"{'no labels' if label is None else 'labels'} and num_classes={num_classes}"
            )
        return
    if label.dtype != torch.int64:
        raise TypeError(f"{argument}: expected int64, got {label.dtype}")
    if label.shape != (rows,):
        raise ValueError(f"{argument}: expected shape [{rows}], got {list(label.shape)}")
    if int(label.min()) < 0 or int(label.max()) >= num_classes:
        raise ValueError(
            f"{argument}: expected labels in [0, {num_classes}), got {int(label.min())} to {int(label.max())}"
        )


def _check_conditions(argument: str, conditions: Mapping[str, Rows], rows: int) -> None:
    for name, values in conditions.items():
        if len(values) != rows:
            raise ValueError(f"{argument}: expected {rows} rows of {name!r}, one for each sample, got {len(values)}")
