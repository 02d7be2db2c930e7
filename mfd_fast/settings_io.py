"""Settings from a preset, a TOML file and ``key=value`` texts; settings to TOML; what every key means."""

import difflib
import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mfd_fast.config import Field, Section, SettingError, Settings, did_you_mean
from mfd_fast.presets import METHOD_DEFAULTS, PRESETS

OPTIONS_OF = {"model.name": "model.options", "data.name": "data.options", "distill.method": "distill.method_options"}
"""The key that chooses something, and the table of its options."""
OPTION_TABLES = tuple(OPTIONS_OF.values())
DEFAULT_PRESET = "demo"
LONGEST_KEY = 200
CHANGEABLE = (
    "pipeline",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skipped_updates",
    "sample_rows",
    "compile",
    "teacher_weights",
    "zero_stage",
    "zero_offload",
    "threads",
    "device",
    "max_seconds",
    "patience_seconds",
    "deterministic",
    "tensorboard",
)
"""Last parts of the keys that may change between a stop and a resume: they say how a run is executed and watched."""

S = TypeVar("S", bound=Section)


class SettingLine(NamedTuple):
    """One setting as `mfd-fast info --settings` prints it."""

    key: str
    type: str
    default: Any
    help: str


def load_settings(preset: str | None = None, file: Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a run: the preset, over it the TOML ``file``, over that the ``key=value`` texts.

    Without ``preset`` the one that the file names is used, or "demo". Below all of them lie the defaults of the chosen
    method (`mfd_fast.presets.METHOD_DEFAULTS`). A table of options in the file replaces the table of the preset,
    ``model.options.width=64`` changes one entry, and a new ``model.name``, ``data.name`` or ``distill.method`` drops
    the options of the old one. ValueError names the key, what was expected and what came.
    """
    from_file = dict(_flatten_tables(_read_toml(file))) if file is not None else {}
    name = _preset_name(preset, from_file.get("preset"), file)
    values = dict(_flatten(Settings(preset=name)))
    layers = [(PRESETS[name], ""), (from_file, f"{file}: "), (dict(_parse_override(text) for text in overrides), "")]
    chosen = [layer["distill.method"] for layer, _ in layers if "distill.method" in layer]
    _apply(values, METHOD_DEFAULTS.get(str(chosen[-1]), {}) if chosen else {})
    for layer, source in layers:
        _apply(values, layer, source)
    return _build(Settings, values)


def _preset_name(asked: str | None, written: Any, file: Path | None) -> str:
    if asked is not None and written not in (None, asked):
        raise ValueError(f"preset {asked!r} was asked for, but {file} says preset = {written!r}; give one of them")
    name = next((name for name in (asked, written) if name is not None), DEFAULT_PRESET)
    if not isinstance(name, str) or name not in PRESETS:
        known = ", ".join(map(repr, PRESETS))
        raise ValueError(f"preset must be one of {known}; got {name!r}{did_you_mean(str(name), tuple(PRESETS))}")
    return name


def from_toml(text: str) -> Settings:
    """The settings that `to_toml` wrote; keys left out take the defaults of the dataclasses, not of a preset."""
    values = dict(_flatten(Settings()))
    _apply(values, dict(_flatten_tables(_parse_toml(text, "settings"))))
    return _build(Settings, values)


def to_toml(settings: Settings) -> str:
    """All settings as TOML; None is written as the text "none"."""
    lines: list[str] = []
    table = ""
    for key, value in _flatten(settings):
        parent, _, name = key.rpartition(".")
        if key in OPTION_TABLES:
            lines += ["", f"[{key}]", *(f"{_toml_key(option)} = {_toml(item)}" for option, item in value.items())]
            table = key
            continue
        if parent != table:
            lines += ["", f"[{parent}]"]
            table = parent
        lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def settings_diff(a: Settings, b: Settings) -> list[tuple[str, Any, Any]]:
    """``(key, value in a, value in b)`` of every setting that differs."""
    other = dict(_flatten(b))
    return [(key, value, other[key]) for key, value in _flatten(a) if value != other[key]]


def lasting_settings(section: Section) -> dict[str, Any]:
    """Dotted key to value of what may not change when a run is resumed."""
    return {key: value for key, value in _flatten(section) if key.rpartition(".")[2] not in CHANGEABLE}


def describe_settings() -> list[SettingLine]:
    """Key, type, default and explanation of every setting."""
    declared = dict(_declared(Settings))
    return [SettingLine(key, declared[key].words, value, declared[key].help) for key, value in _flatten(Settings())]


def _declared(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Field]]:
    for item in fields(section):
        declared = Field.of(item.type)
        if isinstance(declared.type, type) and issubclass(declared.type, Section):
            yield from _declared(declared.type, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, declared


def _flatten(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``(dotted key, value)`` of every setting; plain keys before sub-sections, as TOML needs them."""
    nested: list[tuple[str, Section]] = []
    for item in fields(section):
        value = getattr(section, item.name)
        if isinstance(value, Section):
            nested.append((f"{prefix}{item.name}.", value))
        else:
            yield prefix + item.name, value
    for deeper, value in nested:
        yield from _flatten(value, deeper)


def _flatten_tables(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and value and key not in OPTION_TABLES:
            yield from _flatten_tables(value, f"{key}.")
        elif value != {} or key not in _SECTIONS:
            yield key, value


_SETTINGS = dict(_declared(Settings))
_SECTIONS = {key[:end] for key in _SETTINGS for end in range(len(key)) if key[end] == "."}


def _apply(values: dict[str, Any], changes: Mapping[str, Any], source: str = "") -> None:
    """Write ``changes`` over ``values`` in place; names first, because a new name drops the options of the old one."""
    for key in sorted(changes, key=lambda key: key not in OPTIONS_OF):
        value = changes[key]
        if key in OPTIONS_OF and value != values[key]:
            values[OPTIONS_OF[key]] = {}
        parent, _, name = key.rpartition(".")
        if parent in OPTION_TABLES:
            values[parent] = {**values[parent], name: value}
        elif key in _SETTINGS:
            values[key] = value
        else:
            raise ValueError(source + _unknown(key))


def _unknown(key: str) -> str:
    """What is wrong with a key that does not exist, with the nearest one that does."""
    if key in _SECTIONS:
        example = next(known for known in _SETTINGS if known.startswith(f"{key}."))
        return f"{key!r} is a section; set a key in it, such as {example!r}"
    parent, _, name = key.rpartition(".")
    if len(key) > LONGEST_KEY:  # comparing it with all the others would take for ever
        return f"unknown setting {key[:LONGEST_KEY]!r}...; `mfd-fast info --settings` lists all of them"
    if tables := difflib.get_close_matches(parent, OPTION_TABLES, n=1, cutoff=0.8):
        return f"unknown setting {key!r}; did you mean '{tables[0]}.{name}'?"

    def likeness(known: str) -> float:
        whole = difflib.SequenceMatcher(None, key, known).ratio()
        last = difflib.SequenceMatcher(None, name, known.rpartition(".")[2]).ratio()
        return whole + last

    nearest = max(_SETTINGS, key=likeness)
    if likeness(nearest) < 1.1:
        return f"unknown setting {key!r}; `mfd-fast info --settings` lists all of them"
    return f"unknown setting {key!r}; did you mean {nearest!r}?"


def _build(section: type[S], values: Mapping[str, Any], prefix: str = "") -> S:
    given: dict[str, Any] = {}
    for item in fields(section):
        declared = Field.of(item.type).type
        if isinstance(declared, type) and issubclass(declared, Section):
            given[item.name] = _build(declared, values, f"{prefix}{item.name}.")
        else:
            given[item.name] = values[prefix + item.name]
    try:
        return section(**given)
    except SettingError as error:
        raise SettingError(prefix + error.key.rpartition(".")[2], error.problem) from None


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals or not key:
        raise ValueError(f"a setting must be given as key=value; got {text!r}")
    if key == "preset":
        raise ValueError(f"preset is chosen by its own argument, not as a setting; got {text!r}")
    try:
        parsed = _parse_toml(f"value = {raw}", "value")
    except ValueError:
        return key, raw
    is_text = key in _SETTINGS and _SETTINGS[key].type in (str, str | None)
    # A text that looks like a number, or several TOML lines in one value, is taken as it was typed.
    if len(parsed) > 1 or (is_text and not isinstance(parsed["value"], str)):
        return key, raw
    return key, parsed["value"]


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a UTF-8 text: {error}") from None
    return _parse_toml(text, str(file))


def _parse_toml(text: str, source: str) -> dict[str, Any]:
    # tomllib came with Python 3.11; tomli is the same module for 3.10.
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        parsed: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise ValueError(f"{source}: {error}") from None
    return parsed


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Any) -> str:
    """One value as TOML: None, a bool, a number, a text or a list of them."""
    if value is None:
        return '"none"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        # TOML's basic strings are JSON's, except that DEL must be escaped and surrogate pairs must not be.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
