"""A user's own teacher: ``package.module:factory`` gives a module, a safetensors file its weights."""

import importlib
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from torch import nn

from mfd_fast.storage import read_tensors


def load_object(reference: str) -> Any:
    """The object that ``package.module:name`` names; the working directory is searched as Python scripts do.

    Raises:
        ValueError: the reference is malformed, or the module or name does not exist; the message says which.
    """
    module_name, colon, name = reference.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"expected package.module:name, got {reference!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        hint = f"; give {module_name[:-3]}:{name}" if module_name.endswith(".py") else ""
        raise ValueError(f"{reference!r}: there is no module {error.name!r}{hint}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{reference!r}: module {module_name!r} has no {part!r}")
        found = getattr(found, part)
    return found


def call_factory(reference: str) -> nn.Module:
    """The module that the factory (a function or class without required arguments) makes.

    Raises:
        ValueError: the reference is wrong.
        TypeError: what it names does not make an nn.Module.
    """
    module = _call(reference)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{reference!r} must return an nn.Module, got {type(module).__name__}")
    return module


def load_teacher(reference: str, weights: Path | None) -> nn.Module:
    """A user's teacher, with the weights of a safetensors file if one is given.

    Raises:
        ValueError: the weights do not fit the module.
        FileNotFoundError: there is no such file.
    """
    module = call_factory(reference)
    if weights is not None:
        load_weights(module, weights)
    return module


def load_field(reference: str, weights: Path | None) -> Callable[..., Any]:
    """A user's field, an nn.Module or any other callable that the factory makes."""
    field = _call(reference)
    if not callable(field):
        raise TypeError(f"{reference!r} must return a callable field(x, t), got {type(field).__name__}")
    if weights is not None:
        if not isinstance(field, nn.Module):
            raise TypeError(f"weights can only be loaded into an nn.Module, {reference!r} makes {type(field).__name__}")
        load_weights(field, weights)
    return cast(Callable[..., Any], field)


def load_weights(module: nn.Module, weights: Path) -> None:
    """Load a safetensors file into a module; FileNotFoundError or ValueError say what is wrong with it."""
    if not weights.is_file():
        raise FileNotFoundError(f"weights must be a safetensors file, {weights} does not exist")
    try:
        tensors = read_tensors(weights)
    except ValueError as error:
        save = "safetensors.torch.save_file(module.state_dict(), 'weights.safetensors')"
        raise ValueError(f"{error} (where the module is, {save} writes one)") from error
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit the module: {error}") from error


def _call(reference: str) -> Any:
    factory = load_object(reference)
    if not callable(factory):
        raise TypeError(f"{reference!r} must be callable, got {type(factory).__name__}")
    with suppress(ValueError):  # what Python knows no parameters of is called as it is
        try:
            inspect.signature(factory).bind()
        except TypeError as error:
            raise TypeError(f"{reference!r} must need no arguments: {error}") from error
    return factory()
