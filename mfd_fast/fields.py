"""Wrappers that give fields of other conventions the convention of `mfd_fast.path` (0 = data, 1 = noise)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.ops.mlp_program import NotAnMLP, ProgramBuilder, Slot, activation_name
from mfd_fast.path import expand_times
from mfd_fast.prepared_conditions import PreparesInner
from mfd_fast.types import Condition, ConditionGroup, RowGroup, SharedBackbone, VelocityField, shares_backbone

TimeRange = tuple[float, float]


def time_range_of(field: Any) -> TimeRange | None:
    """The ``time_range`` that a field declares, or None."""
    declared: TimeRange | None = getattr(field, "time_range", None)
    return declared


@dataclass(frozen=True)
class reversed_time(PreparesInner):
    """A field with 0 = noise, 1 = data and velocity data - noise: ``v(x, t) = -field(x, 1 - t)``."""

    field: VelocityField

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The velocity ``[B, ...]`` at ``x`` ``[B, ...]``, ``t`` ``[B]``."""
        return -self.field(x, 1 - t, **condition)

    @property
    def time_range(self) -> TimeRange | None:
        """The range of the field, if it declares one, in reversed time."""
        inner = time_range_of(self.field)
        return None if inner is None else (1 - inner[1], 1 - inner[0])


@dataclass(frozen=True)
class negated(PreparesInner):
    """A field with the same times and velocity data - noise: ``v(x, t) = -field(x, t)``.

    Around `reversed_time` it gives a field that counts time the other way and yet predicts noise - data.
    """

    field: VelocityField

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The velocity ``[B, ...]`` at ``x`` ``[B, ...]``, ``t`` ``[B]``."""
        return -self.field(x, t, **condition)

    @property
    def time_range(self) -> TimeRange | None:
        """The range of the field, if it declares one."""
        return time_range_of(self.field)


@dataclass(frozen=True)
class scaled_time(PreparesInner):
    """A field that wants times in [0, scale], e.g. 1000: ``v(x, t) = field(x, scale * t)``."""

    field: VelocityField
    scale: float

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The velocity ``[B, ...]`` at ``x`` ``[B, ...]``, ``t`` ``[B]``."""
        return self.field(x, t * self.scale, **condition)

    @property
    def time_range(self) -> TimeRange | None:
        """The range of the field, if it declares one, divided by the scale."""
        inner = time_range_of(self.field)
        return None if inner is None else (inner[0] / self.scale, inner[1] / self.scale)


@dataclass(frozen=True)
class from_data_prediction(PreparesInner):
    """A network that predicts the data: ``v = (x - network(x, t)) / max(t, min_time)``."""

    field: VelocityField
    min_time: float = 1e-3

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The velocity ``[B, ...]`` at ``x`` ``[B, ...]``, ``t`` ``[B]``; state arithmetic stays in x's dtype."""
        return (x - self.field(x, t, **condition)) / expand_times(t.clamp(min=self.min_time), x)

    @property
    def time_range(self) -> TimeRange | None:
        """The range of the field, if it declares one."""
        return time_range_of(self.field)


@dataclass(frozen=True)
class from_noise_prediction(PreparesInner):
    """A network that predicts the noise: ``v = (network(x, t) - x) / max(1 - t, min_time)``."""

    field: VelocityField
    min_time: float = 1e-3

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The velocity ``[B, ...]`` at ``x`` ``[B, ...]``, ``t`` ``[B]``."""
        return (self.field(x, t, **condition) - x) / expand_times((1 - t).clamp(min=self.min_time), x)

    @property
    def time_range(self) -> TimeRange | None:
        """The range of the field, if it declares one."""
        return time_range_of(self.field)


@dataclass(frozen=True)
class sequential_mlp(PreparesInner):
    """A velocity from an nn.Sequential that takes state and time side by side: ``v(x, t) = field([x, t])``.

    Rollouts of it can be fused (``runner="fused"``) if it consists of Linears and activations. The state is flattened,
    and may have any shape.

    Args:
        field: takes ``[n, F + 1]`` and gives ``[n, F]``; with ``condition`` it takes ``[n, F + 1 + C]``.
        time: "append" puts the time behind the state, "prepend" before it.
        condition: the name of a condition ``[B or 1, C]`` that is put behind both; None for no condition.
        condition_width: its width C.

    Raises ValueError where the arguments do not fit together.
    """

    field: nn.Sequential
    time: str = "append"
    condition: str | None = None
    condition_width: int = 0

    def __post_init__(self) -> None:
        if self.time not in ("append", "prepend"):
            raise ValueError(f"time must be 'append' or 'prepend', got {self.time!r}")
        if (self.condition is None) != (self.condition_width == 0):
            raise ValueError(
                "condition and condition_width go together, "
                f"got condition={self.condition!r}, condition_width={self.condition_width}"
            )

    def __call__(self, x: Tensor, t: Tensor, /, **condition: Tensor) -> Tensor:
        """The velocity ``[B, ...]`` at ``x`` ``[B, ...]``, ``t`` ``[B]``."""
        if condition.keys() != ({self.condition} - {None}):
            raise ValueError(f"the condition must be {self.condition!r}, got {', '.join(condition) or 'none'}")
        flat, time = x.flatten(1), t[:, None].to(x.dtype)
        parts = [flat, time] if self.time == "append" else [time, flat]
        parts += [value.expand(len(x), -1) for value in condition.values()]
        velocity: Tensor = self.field(torch.cat(parts, 1))
        return velocity.view(x.shape)

    def mlp_program(self, build: ProgramBuilder) -> Slot:
        """The layers for fused rollouts; NotAnMLP names a layer that is none of theirs."""
        if type(self.field) is not nn.Sequential:
            raise NotAnMLP(f"the network is a {type(self.field).__name__}, not an nn.Sequential")
        parts = [build.state, build.time] if self.time == "append" else [build.time, build.state]
        if self.condition is not None:
            parts.append(build.vector(self.condition, self.condition_width))
        hidden = build.concatenate(parts)
        spare: list[Slot] = []
        for layer in self.field:
            if isinstance(layer, nn.Linear):
                into = next((slot for slot in spare if slot.width == layer.out_features), None)
                spare = [hidden]
                hidden = build.linear(hidden, layer, into=into)
            else:
                hidden = build.activation(hidden, activation_name(layer))
        return hidden


@dataclass(frozen=True)
class Autocast(PreparesInner):
    """A field whose network computes under autocast; see `autocast`."""

    field: VelocityField
    dtype: torch.dtype

    def __call__(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        """The velocity ``[B, ...]`` in the dtype the network returns."""
        # One context for each call: a cast made without gradients must not be reused where gradients are wanted.
        with torch.autocast(x.device.type, dtype=self.dtype):
            return self.field(x, t, **condition)

    def features(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        """The features of the network, ``[B, feature_width]``, for networks that have them."""
        network: Any = self.field
        with torch.autocast(x.device.type, dtype=self.dtype):
            found: Tensor = network.features(x, t, **condition)
        return found

    def prepare_conditions(self, groups: Sequence[ConditionGroup]) -> list[Condition]:
        """What the wrapped field prepares, under autocast too."""
        with torch.autocast(_device_type(groups), dtype=self.dtype):
            return super().prepare_conditions(groups)

    @property
    def time_range(self) -> TimeRange | None:
        """The range of the field, if it declares one."""
        return time_range_of(self.field)


@dataclass(frozen=True)
class AutocastRole(Autocast):
    """The same for a role of a shared backbone, which stays one (`mfd_fast.types.SharedBackbone`)."""

    field: SharedBackbone

    @property
    def backbone(self) -> Any:
        """The backbone of the wrapped role."""
        return self.field.backbone

    def evaluate_groups(self, groups: list[RowGroup]) -> list[Tensor]:
        """Velocities of groups of rows whose fields are autocast roles of this backbone."""
        inner = [group._replace(field=getattr(group.field, "field", group.field)) for group in groups]
        with torch.autocast(groups[0].x.device.type, dtype=self.dtype):
            return self.field.evaluate_groups(inner)


def autocast(field: VelocityField, dtype: torch.dtype | None) -> VelocityField:
    """``field`` with its network under autocast to ``dtype`` (states and times stay float32); None changes nothing."""
    if dtype is None:
        return field
    return AutocastRole(field, dtype) if shares_backbone(field) else Autocast(field, dtype)


def _device_type(groups: Sequence[ConditionGroup]) -> str:
    """The type of the device on which conditions lie; "cpu" where they hold no tensor."""
    values = (value for _, condition in groups for value in condition.values())
    return next((value.device.type for value in values if isinstance(value, Tensor)), "cpu")
