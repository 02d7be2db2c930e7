"""A folder of pictures and their prompts, as any generator leaves them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PROMPT_FILES = ("prompts.txt", "prompts.jsonl")


class Pictures(NamedTuple):
    """The readable pictures of a folder, in the order of their names."""

    paths: list[Path]
    broken: dict[str, str]
    """What is wrong with each file that could not be read, by its name."""


def needs_metrics_extra(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error to raise from ``error`` when a library of the ``metrics`` extra is not installed."""
    message = f'measuring pictures needs {error.name}, which is not installed: pip install "mfd_fast[metrics]"'
    return ModuleNotFoundError(message, name=error.name)


def list_pictures(folder: Path) -> list[Path]:
    """Files of ``folder`` itself that are named like pictures; numbers in names count as numbers (2 before 10)."""
    return sorted((path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()), key=_order)


def check_pictures(folder: Path) -> Pictures:
    """Decode every picture of ``folder`` once, so that a broken one is known before hours of work.

    Raises:
        NotADirectoryError: ``folder`` is not a folder.
        ValueError: it has no pictures, or none that can be read; the message says why.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder of pictures")
    found = list_pictures(folder)
    if not found:
        raise ValueError(f"{folder} has no pictures ({', '.join(SUFFIXES)})")
    whole, broken = [], {}
    for path in found:
        try:
            read_picture(path)
        except (OSError, ValueError, SyntaxError) as error:  # SyntaxError: Pillow on a damaged PNG
            broken[path.name] = " ".join(str(error).split())
        else:
            whole.append(path)
    if not whole:
        name, reason = next(iter(broken.items()))
        raise ValueError(f"none of the {len(found)} pictures in {folder} can be read; {name}: {reason}")
    return Pictures(whole, broken)


def read_picture(path: Path) -> "Image":
    """The picture as RGB without transparency; OSError, ValueError or SyntaxError when it cannot be read."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise needs_metrics_extra(error) from error
    try:
        with Image.open(path) as image:
            picture: Image.Image = image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is larger than Pillow decodes: {error}") from error
    return picture


def find_prompts(folder: Path) -> Path | None:
    """``prompts.txt`` or ``prompts.jsonl`` of ``folder``; ValueError where both are."""
    found = [folder / name for name in PROMPT_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has {' and '.join(PROMPT_FILES)}: say with --prompts which is right")
    return found[0] if found else None


def read_prompts(file: Path, names: Sequence[str]) -> dict[str, str]:
    """The prompt of every picture, by its name.

    ``.jsonl``: an object a line, ``{"file_name": "7.png", "prompt": "a cat"}``; any other file: a line a prompt, in the
    order of the pictures ``names``, broken ones included.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: prompts and pictures do not match, or a line is empty or not as described; the message names it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file of prompts {file}")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"{file}, line {number} is empty: expected one prompt a picture")
    if file.suffix.lower() == ".jsonl":
        return _by_name(file, lines, names)
    if len(lines) != len(names):
        raise ValueError(f"{file} has {len(lines)} prompts for {len(names)} pictures: expected one prompt a picture")
    return dict(zip(names, (line.strip() for line in lines), strict=True))


def _by_name(file: Path, lines: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    prompts: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry: Any = json.loads(line)
            name, prompt = entry["file_name"], entry["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = prompt = None
        if not isinstance(name, str) or not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f'{file}, line {number}: expected {{"file_name": "...", "prompt": "..."}}, got {line[:80]}'
            )
        if name in prompts:
            raise ValueError(f"{file}, line {number}: a second prompt for {name}")
        prompts[name] = prompt.strip()
    lacking = [name for name in names if name not in prompts]
    strangers = sorted(prompts.keys() - set(names))
    if lacking:
        raise ValueError(f"{file} has no prompt for {len(lacking)} of {len(names)} pictures, the first is {lacking[0]}")
    if strangers:
        raise ValueError(f"{file} has prompts for {len(strangers)} pictures that are not there, as {strangers[0]}")
    return prompts


def _order(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.findall(r"[0-9]+|[^0-9]+", path.name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts], path.name
