"""What a field is made of: which networks it reads, and whether it is still the field that it was."""

import dataclasses
from collections.abc import Hashable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfd_fast.types import Condition, VelocityField, calls_network

CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""What never changes by itself."""
FUNCTIONS = (FunctionType, BuiltinFunctionType, type)
"""What a copy of a module has in common with the module."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


class Unknown(Exception):
    """Why it cannot be said what a field is made of."""


class Identity(NamedTuple):
    """Two fields with the same key compute the same from the same networks while those live."""

    key: Hashable
    networks: tuple[nn.Module, ...]
    """The modules whose weights the field reads; the key contains their ids."""


def identity_of(field: VelocityField) -> Identity:
    """The identity of a module, a field on a network such as a role, or a dataclass that wraps such fields.

    Raises:
        Unknown: the field is, or contains, something else, such as a function.
    """
    if isinstance(field, nn.Module):
        return Identity(("module", id(field)), (field,))
    if dataclasses.is_dataclass(field) and not isinstance(field, type):
        return _wrapper(field)
    if calls_network(field) and isinstance(field.network, nn.Module):
        constants = tuple((name, value) for name, value in vars(field).items() if isinstance(value, CONSTANTS))
        return Identity((type(field), id(field.network), constants), (field.network,))
    raise Unknown(
        f"the field is a {type(field).__name__}, not an nn.Module or a wrapper of one, so its weights are hidden"
    )


def _wrapper(field: Any) -> Identity:
    key: list[Any] = [type(field)]
    networks: list[nn.Module] = []
    for part in dataclasses.fields(field):
        value = getattr(field, part.name)
        if not callable(value) or isinstance(value, type):
            key.append(_constant(part.name, value))
            continue
        inner = identity_of(value)
        key.append(inner.key)
        networks += inner.networks
    return Identity(tuple(key), tuple(networks))


def _constant(name: str, value: Any) -> Hashable:
    if isinstance(value, tuple):
        return tuple(_constant(name, part) for part in value)
    if not isinstance(value, CONSTANTS):
        raise Unknown(f"{name} is a {type(value).__name__}, of which it cannot be seen whether it has changed")
    return type(value), value


def condition_key(condition: Condition) -> Hashable:
    """What must be equal for two conditions to fit into the same memory; everything but tensors counts by its value.

    Raises:
        Unknown: a value that cannot be compared.
    """
    return tuple((name, _value_key(name, value)) for name, value in condition.items())


def _value_key(name: str, value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape[1:], value.dtype, value.shape[0] == 1
    if isinstance(value, Mapping):
        return condition_key(value)
    return _constant(name, value)


def structure(module: nn.Module) -> Hashable:
    """Which modules a module consists of, under which names, and what runs when each of them is called."""
    parts = tuple(
        (
            *(id(part), type(part), id(vars(part).get("forward"))),
            *(tuple(part._forward_hooks), tuple(part._forward_pre_hooks)),
            # Of a scripted module these can only be asked for their keys.
            *(tuple(names.keys()) for names in (part._modules, part._parameters, part._buffers)),
        )
        for part in module.modules()
    )
    return parts, tuple(name for name, _ in module.named_parameters())  # without those that are another one


def attributes(module: nn.Module, integers: bool = True) -> dict[str, Hashable]:
    """What the attributes of one module, its parts apart, are now: constants, also inside lists and the like.

    Attributes with anything else in them are left out.
    """
    found: dict[str, Hashable] = {}
    for name, value in vars(module).items():
        if name not in _OF_EVERY_MODULE:
            try:
                found[name] = _snapshot(name, value, integers)
            except Unknown:
                continue
    return found


def _snapshot(name: str, value: Any, integers: bool) -> Hashable:
    kind = type(value)
    if kind is int and not integers:
        return int
    if kind in CONSTANTS:  # first, because networks have thousands of them
        return kind, value
    if isinstance(value, FUNCTIONS):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        parts = (_snapshot(name, part, integers) for part in value)
        return kind, (frozenset(parts) if isinstance(value, set | frozenset) else tuple(parts))
    if isinstance(value, Mapping):
        pairs = ((_snapshot(name, key, True), _snapshot(name, part, integers)) for key, part in value.items())
        return kind, tuple(pairs)
    return _constant(name, value)


def fingerprint(networks: tuple[nn.Module, ...]) -> Hashable:
    """Where the weights lie, and modules, hooks, flags, real numbers and names: what a recording contains.

    The values of the weights are not part of it: they are read from where they lie. Neither are integers, which are
    sizes, or count calls and would then differ every time.
    """
    return tuple(
        (structure(network), *((_places(part), tuple(attributes(part, False).items())) for part in network.modules()))
        for network in networks
    )


def _places(module: nn.Module) -> Hashable:
    return tuple(
        None if tensor is None else (tensor.data_ptr(), tensor.dtype)
        for tensors in (module._parameters, module._buffers)
        for tensor in tensors.values()
    )
