"""Compiled copies of fields: the same weights in the same memory, a faster forward.

The user's module is never touched. A copy of its structure shares the storage of its weights, so whatever changes them
in place (an optimiser, an EMA swap, ``load_state_dict``, ``.data.copy_``) is seen at once; weights or buffers that were
replaced by others are linked anew before every rollout. On the CPU float32 Linears go through the faster of the two
matrix products (`mfd_fast.ops.linear`).
"""

import dataclasses
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mfd_fast.fields import Autocast
from mfd_fast.sharing import shared_copy
from mfd_fast.types import VelocityField


class NotCompilable(Exception):
    """Why a field runs eager."""


class CompiledCopy:
    """A module's compiled copy. Call `refresh` before a rollout."""

    def __init__(self, module: nn.Module) -> None:
        # Holds the weights of the module but not the module, whose life decides how long the copy is kept.
        self._copy = shared_copy(module)
        self.uses_onednn = _use_onednn(self._copy)
        self._compiled: Any = torch.compile(self._copy, dynamic=True)

    def refresh(self, module: nn.Module) -> None:
        """Link the weights that ``module`` has now and follow its training flags."""
        own = dict(self._copy.named_parameters())
        for name, parameter in module.named_parameters():
            if own[name].data_ptr() != parameter.data_ptr():
                own[name].data = parameter.detach()
        for ours, theirs in zip(self._copy.modules(), module.modules(), strict=True):
            ours.training = theirs.training
            for name, buffer in theirs._buffers.items():
                if ours._buffers.get(name) is not buffer:
                    ours._buffers[name] = buffer

    def __call__(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        """The velocity ``[B, ...]``; a constant."""
        velocity: Tensor = self._compiled(x, t, **condition)
        return velocity


_COPIES: "WeakKeyDictionary[nn.Module, CompiledCopy]" = WeakKeyDictionary()
_WARM: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()
"""Modules for which a warm-up has shown what is faster, and its words about it."""


def compiled_field(field: VelocityField) -> VelocityField:
    """``field`` with its network replaced by the compiled copy.

    Raises:
        NotCompilable: the field is no module and no wrapper of one, or its module cannot be copied.
    """
    if isinstance(field, nn.Module):
        copy = _COPIES.get(field)
        if copy is None:
            try:
                copy = _COPIES[field] = CompiledCopy(field)
            except TypeError as error:
                raise NotCompilable(str(error)) from error
        copy.refresh(field)
        return copy
    if isinstance(field, Autocast):
        raise NotCompilable("the field computes under autocast; give it a network in low precision and field_dtype=")
    if dataclasses.is_dataclass(field) and not isinstance(field, type) and hasattr(field, "field"):
        return dataclasses.replace(field, field=compiled_field(field.field))
    raise NotCompilable(f"the field is a {type(field).__name__}, not an nn.Module or a wrapper of one")


def network_of(field: VelocityField) -> nn.Module | None:
    """The module inside a field and its wrappers, or None."""
    inner: Any = field
    while not isinstance(inner, nn.Module):
        if not hasattr(inner, "field"):
            return None
        inner = inner.field
    return inner


def remember(module: nn.Module, words: str | None) -> None:
    """Let ``runner="auto"`` use the compiled copy of ``module`` from now on, and say why; None takes that back."""
    if words is None:
        _WARM.pop(module, None)
    else:
        _WARM[module] = words


def remembered(field: VelocityField) -> str | None:
    """Why ``runner="auto"`` uses the compiled copy for this field, or None."""
    module = network_of(field)
    return None if module is None else _WARM.get(module)


def measured_choices(runner: str, device: torch.device) -> dict[str, object]:
    """What a runner decides by measuring, and what two runs must therefore agree in to give the same bits."""
    if runner != "compiled" or device.type != "cpu":
        return {}
    from mfd_fast.ops.linear import why_not_onednn

    return {"float32 matrix products": "torch" if why_not_onednn() else "oneDNN"}


def _use_onednn(module: nn.Module) -> bool:
    """Replace the Linears of a copy where oneDNN is faster here; whether it was done."""
    from mfd_fast.ops.linear import OneDNNLinear, why_not_onednn

    linears = [part for part in module.modules() if _is_plain_linear(part)]
    fits = all(part.weight.device.type == "cpu" and part.weight.dtype == torch.float32 for part in linears)
    if not linears or not fits or why_not_onednn() is not None:
        return False
    # One replacement for each Linear, so that a layer used in two places stays one layer.
    replacements = {id(linear): OneDNNLinear(linear) for linear in linears}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
    return True


def _is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether nothing but the product happens in this layer: no subclass, no hook, no forward of its own."""
    changed = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not changed
