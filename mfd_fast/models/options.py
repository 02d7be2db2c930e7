"""Checks of named options against a constructor, with the nearest valid name in the message."""

import difflib
import inspect
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: ``; did you mean 'x'? Valid: x, y``."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Valid: {', '.join(names) or 'none'}"


def option_types(constructor: Any) -> dict[str, Any]:
    """Keyword-only parameters of ``constructor`` and their annotations."""
    parameters = inspect.signature(constructor).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_options(owner: str, constructor: Any, options: Mapping[str, Any]) -> None:
    """Raise ValueError unless every option is a keyword-only parameter of ``constructor`` with a value of its type."""
    known = option_types(constructor)
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"unknown option {name!r} of {owner!r}{nearest(name, known)}")
        if not fits(value, known[name]):
            raise ValueError(f"option {name!r} of {owner!r} must be {spelled(known[name])}, got {value!r}")


def fits(value: Any, annotation: Any) -> bool:
    """Whether ``value`` is of the annotated type: plain types, unions, and sequences of those; an int is a float."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, part) for part in typing.get_args(annotation))
    if origin is Sequence:
        (item,) = typing.get_args(annotation)
        return isinstance(value, list | tuple) and all(fits(v, item) for v in value)
    if annotation is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if annotation is types.NoneType else isinstance(value, annotation)


def spelled(annotation: Any) -> str:
    """An annotation as people write it."""
    # In Python 3.10 a type with arguments, such as Sequence[int], passes for a type too.
    plain = isinstance(annotation, type) and not typing.get_args(annotation)
    return annotation.__name__ if plain else str(annotation).replace("collections.abc.", "")
