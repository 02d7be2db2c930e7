"""What every velocity network has in common: its shape, its classes, its options and the checks of its inputs."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mfd_fast.models.embeddings import ConditionEmbedding


class VelocityNetwork(nn.Module):
    """A network ``model(x, t, label=None, r=None) -> velocity`` for samples of one shape.

    ``x`` ``[B, *sample_shape]``, ``t`` ``[B]`` with 0 = data and 1 = noise, ``label`` int64 ``[B]``, where index
    ``num_classes`` and None both mean no label. ``r`` ``[B]`` is for networks that `with_second_time` made: they give
    the mean velocity from t to r, and the velocity where r is None or t.

    ``model.features(x, t, label=None)`` is a description ``[B, feature_width]`` of the sample for a discriminator.
    """

    condition: ConditionEmbedding
    """Embedding of the times and the label."""
    feature_width: int
    """Size of `features`."""

    sample_shape: tuple[int, ...]
    """Shape of one sample, without the batch."""
    num_classes: int | None
    """Number of labels, or None for a network without labels."""
    options: dict[str, Any]
    """Keyword arguments of the constructor, such as JSON can hold."""

    def __init__(self, sample_shape: Sequence[int], num_classes: int | None, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.sample_shape = checked_shape(sample_shape)
        self.num_classes = None if num_classes is None else checked_count("num_classes", num_classes)
        self.options = {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}

    @property
    def num_features(self) -> int:
        """Numbers in one sample."""
        return math.prod(self.sample_shape)

    def with_second_time(self) -> "VelocityNetwork":
        """A copy with the same weights that takes a second time r, which changes nothing until it is trained."""
        copied = copy.deepcopy(self)
        copied.condition.add_second_time()
        return copied

    def check_inputs(self, x: Tensor, t: Tensor) -> None:
        """Raise ValueError unless ``x`` is ``[B, *sample_shape]`` and ``t`` is ``[B]``."""
        if x.shape[1:] != self.sample_shape:
            raise ValueError(f"x must have shape [B, {str(list(self.sample_shape))[1:]}, got {list(x.shape)}")
        if t.dim() != 1 or t.shape[0] != x.shape[0]:
            raise ValueError(f"t must have shape [{x.shape[0]}], one time for each row of x, got {list(t.shape)}")


def checked_shape(sample_shape: Sequence[int]) -> tuple[int, ...]:
    """``sample_shape`` as a tuple of positive integers; ValueError otherwise."""
    shape = tuple(sample_shape)
    if not shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"sample_shape must be one or more positive integers, got {sample_shape!r}")
    return shape


def checked_count(name: str, value: int) -> int:
    """``value`` if it is an integer of at least 1; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A Linear whose weight and bias are zero, so that the network begins as the zero velocity."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
