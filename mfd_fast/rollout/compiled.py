"""Compiled copies of fields: the same weights in the same memory, a faster forward.

The user's module is never touched. A copy of its structure shares the storage of its weights, so whatever changes them
in place (an optimiser, an EMA swap, ``load_state_dict``, ``.data.copy_``) is seen at once; weights or buffers that were
replaced by others are linked anew before every rollout, and flags, numbers and names among the attributes are copied. A
module that has got other parts or hooks since then is copied anew. On the CPU float32 Linears go through the faster of
the two matrix products (`mfd_fast.ops.linear`).
"""

import dataclasses
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mfd_fast import native
from mfd_fast.module_copies import shared_copy
from mfd_fast.rollout.identity import attributes, structure
from mfd_fast.types import VelocityField, calls_network

INNER = ("field", "teacher", "auxiliary")
"""Members of wrappers that are fields themselves."""


class NotCompilable(Exception):
    """Why a field runs eager."""


class CompiledCopy:
    """A module's compiled copy. Call `refresh` before a rollout."""

    def __init__(self, module: nn.Module) -> None:
        # Holds the weights of the module but not the module, whose life decides how long the copy is kept.
        self._copy = shared_copy(module)
        self._structure = structure(module)
        self._attributes = [attributes(part) for part in module.modules()]
        self.uses_onednn = use_onednn(self._copy)
        self._compiled: Any = torch.compile(own_code(self._copy), dynamic=True)

    def is_of(self, module: nn.Module) -> bool:
        """Whether ``module`` still has the parts, names and hooks that were copied."""
        return self._structure == structure(module)

    def refresh(self, module: nn.Module) -> None:
        """Link the weights that ``module`` (`is_of`) has now and follow its flags and other attributes."""
        own = dict(self._copy.named_parameters())
        for name, parameter in module.named_parameters():
            if own[name].data_ptr() != parameter.data_ptr():
                own[name].data = parameter.detach()
        for index, (ours, theirs) in enumerate(zip(self._copy.modules(), module.modules(), strict=True)):
            self._follow(index, ours, theirs)
            for name, buffer in theirs._buffers.items():
                if ours._buffers.get(name) is not buffer:
                    ours._buffers[name] = buffer

    def _follow(self, index: int, ours: nn.Module, theirs: nn.Module) -> None:
        """Copy the attributes of one part that have changed; what the copy has changed by itself stays."""
        before, now = self._attributes[index], attributes(theirs)
        if before == now:
            return
        for name in before.keys() - now.keys():
            vars(ours).pop(name, None)
        for name, value in now.items():
            if name not in before or before[name] != value:
                vars(ours)[name] = deepcopy(vars(theirs)[name])
        self._attributes[index] = now

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        """What the module would return; a constant."""
        velocity: Tensor = self._compiled(*arguments, **named)
        return velocity


_COPIES: "WeakKeyDictionary[nn.Module, CompiledCopy]" = WeakKeyDictionary()


class Measured(NamedTuple):
    """What a warm-up has found for a module."""

    runners: tuple[str, ...]
    """Those faster than eager, the fastest first."""
    words: str
    """By how much."""


_WARM: "WeakKeyDictionary[nn.Module, Measured]" = WeakKeyDictionary()
"""Modules for which a warm-up has shown that something is faster."""


def compiled_field(field: VelocityField) -> VelocityField:
    """``field`` with its network, or that of each of its parts, replaced by the compiled copy.

    Raises:
        NotCompilable: the field is no module and no wrapper of one, or its module cannot be copied.
    """
    return with_copies(field, _compiled_copy)


def with_copies(field: VelocityField, copy: Callable[[nn.Module], Any]) -> VelocityField:
    """``field`` with every network in it replaced by ``copy(network)``.

    Raises:
        NotCompilable: the field is no module and no wrapper of one.
    """
    if isinstance(field, nn.Module):
        copied: VelocityField = copy(field)
        return copied
    if calls_network(field):
        return field.with_network(copy(field.network))
    inner = _inner_fields(field)
    if not inner:
        raise NotCompilable(f"the field is a {type(field).__name__}, not an nn.Module or a wrapper of one")
    parts: Any = {name: with_copies(part, copy) for name, part in inner.items()}
    return dataclasses.replace(field, **parts)  # type: ignore[type-var]


def _compiled_copy(module: nn.Module) -> CompiledCopy:
    found = _COPIES.get(module)
    if found is None or not found.is_of(module):
        try:
            found = _COPIES[module] = CompiledCopy(module)
        except TypeError as error:
            raise NotCompilable(str(error)) from error
    found.refresh(module)
    return found


def _inner_fields(field: Any) -> dict[str, VelocityField]:
    """The fields that a wrapper holds; nothing for what is no wrapper."""
    if not dataclasses.is_dataclass(field) or isinstance(field, type):
        return {}
    return {name: getattr(field, name) for name in INNER if hasattr(field, name)}


def network_of(field: VelocityField) -> nn.Module | None:
    """The module inside a field and its wrappers (the teacher's of a pair), or None."""
    inner: Any = field
    while not isinstance(inner, nn.Module):
        parts = _inner_fields(inner)
        if calls_network(inner):
            inner = inner.network
        elif parts:
            inner = next(iter(parts.values()))
        else:
            return None
    return inner


def own_code(module: nn.Module) -> Callable[..., Tensor]:
    """A function that calls ``module`` and whose code is no other function's.

    The compiler keeps its graphs with the code of a function and gives up (silently) after eight. Modules of one class
    share the code of their ``forward``, so without this a ninth network of a process would run eager.
    """

    def call(*arguments: Any, **named: Any) -> Tensor:
        result: Tensor = module(*arguments, **named)
        return result

    call.__code__ = call.__code__.replace()
    return call


def remember(module: nn.Module, measured: Measured | None) -> None:
    """Let ``runner="auto"`` use what was measured for ``module`` from now on; None takes that back."""
    if measured is None:
        _WARM.pop(module, None)
    else:
        _WARM[module] = measured


def remembered(field: VelocityField) -> Measured | None:
    """What ``runner="auto"`` goes by for this field, or None."""
    module = network_of(field)
    return None if module is None else _WARM.get(module)


def measured_choices(runner: str, device: torch.device) -> dict[str, object]:
    """What a runner decides by measuring, and what two runs must therefore agree in to give the same bits."""
    core = native.core() if runner == "fused" and device.type == "cpu" else None
    if core is not None:
        return {"vectors of fused rollouts": max(core.MLP_LANES)}
    if runner != "compiled" or device.type != "cpu":
        return {}
    from mfd_fast.ops.linear import why_not_onednn

    return {"float32 matrix products": "torch" if why_not_onednn() else "oneDNN"}


def use_onednn(module: nn.Module) -> bool:
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
