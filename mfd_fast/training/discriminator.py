"""A discriminator: a small head on features of the teacher or the auxiliary."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.rows import first_rows
from mfd_fast.streams import derive_seed, kept_random_state
from mfd_fast.types import Condition, VelocityField

HEAD_WIDTH = 128


class FeatureDiscriminator:
    """Logits from ``field.features(x, t, **condition)``; only ``head`` is its own, the features belong to a role."""

    def __init__(self, field: VelocityField, head: nn.Module) -> None:
        self._field: Any = field
        self.head = head

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Logits ``[B]`` float32 of ``x`` ``[B, ...]`` at ``t`` ``[B]``."""
        features: Tensor = self._field.features(x, t, **first_rows(condition, len(x)))
        logits: Tensor = self.head(features.float())
        return logits.squeeze(1)


def make_discriminator(
    fields: Mapping[str, VelocityField], role: str | None, seed: int, device: torch.device
) -> FeatureDiscriminator | None:
    """A new discriminator on the features of ``role``, float32; None without a role."""
    if role is None:
        return None
    field: Any = fields[role]
    width = int(getattr(field, "field", field).feature_width)  # a field under autocast knows the network
    with kept_random_state():
        torch.manual_seed(derive_seed(seed, "distill/discriminator", 0))
        head = nn.Sequential(nn.Linear(width, HEAD_WIDTH), nn.SiLU(), nn.Linear(HEAD_WIDTH, 1))
    return FeatureDiscriminator(field, head.to(device))
