"""The two fields of a distillation as plain functions of (x, t, label), for libraries that know nothing of guidance."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``field(x [n, ...], t [n], label [n]) -> velocity [n, ...]``."""


def conditional(network: nn.Module) -> Field:
    """The network with its label."""

    def field(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        velocity: Tensor = network(x, t, label=label)
        return velocity

    return field


def guided(network: nn.Module, scale: float, no_label: int) -> Field:
    """Classifier-free guidance: the rows without label and with it as one batch of 2n rows."""

    def field(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        labels = torch.cat([torch.full_like(label, no_label), label])
        without, given = network(torch.cat([x, x]), torch.cat([t, t]), label=labels).chunk(2)
        velocity: Tensor = without + scale * (given - without)
        return velocity

    return field
