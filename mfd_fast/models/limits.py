"""Networks of a description that a stranger may have written: not larger than the weights that come with it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from mfd_fast.models import model_from_description
from mfd_fast.models.base import VelocityNetwork

TIMES, MORE = 4, 1 << 20
"""Numbers that a network may have beyond those of its weights: buffers that are not kept."""


def model_for_weights(description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> VelocityNetwork:
    """`mfd_fast.models.model_from_description`, after an outline of it that takes no memory.

    Raises:
        ValueError: the network needs far more numbers than ``weights`` have, or the description is wrong.
    """
    most = TIMES * sum(value.numel() for value in weights.values()) + MORE
    try:
        with at_most(most), torch.device("meta"):
            model_from_description(description)
    except (RuntimeError, OverflowError, MemoryError, TypeError) as error:  # a shape beyond 64 bits
        raise ValueError(f"the network cannot be built as described: {' '.join(str(error).split())[:200]}") from error
    return model_from_description(description)


@contextmanager
def at_most(numbers: int) -> Iterator[None]:
    """Inside, modules may get parameters and buffers of so many elements together; ValueError at the first beyond."""
    left = numbers

    def count(_: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal left
        left -= 0 if value is None else value.numel()
        if left < 0:
            raise ValueError(f"the network as described needs more than {numbers} numbers, its weights have fewer")

    hooks = [register(count) for register in (_PARAMETERS, _BUFFERS)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_PARAMETERS: Any = register_module_parameter_registration_hook
_BUFFERS: Any = register_module_buffer_registration_hook
