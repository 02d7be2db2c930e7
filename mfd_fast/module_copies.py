"""Copies of a user's module that leave the module itself alone."""

import copy
from typing import Any

from torch import nn


def copied_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(module, memo)``; TypeError with the reason when it cannot be copied."""
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # deepcopy runs code of the user's classes and may raise anything
        inner = getattr(module, "module", None)
        hint = f"; pass its .module, the {type(inner).__name__} inside" if isinstance(inner, nn.Module) else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TypeError(f"module ({type(module).__name__}) cannot be copied{hint}: {reason}") from error


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy of the structure of ``module`` whose parameters (frozen) and buffers are the same memory."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    for name, parameter in module.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise TypeError(f"module has a parameter without a shape yet ({name}): run it once before")
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copied_module(module, memo)
