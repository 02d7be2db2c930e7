"""Prompt files: one prompt a line, as plain text, JSON lines or tab-separated columns."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

LONGEST = 20_000
"""Characters of a prompt; more is taken for a file that is no list of prompts."""
COLUMNS = ("prompt", "caption", "text")
"""What the prompt may be called in a JSON object or in the first line of a TSV file."""


class Broken(NamedTuple):
    """A line that gives no prompt."""

    line: int
    """From 1."""
    reason: str


class PromptFile(NamedTuple):
    """What a prompt file holds."""

    prompts: list[str]
    broken: list[Broken]


def read_prompts(path: Path) -> PromptFile:
    """The prompts of a ``.tsv``, ``.jsonl`` or ``.txt`` file in UTF-8; lines that give none are listed, not fatal.

    * ``.txt``: a prompt a line.
    * ``.jsonl``: a text a line, or an object with ``prompt``, ``caption`` or ``text``.
    * ``.tsv``: columns image, prompt, score and at least one more, as the released training reads them; or a first line
      that names a column ``prompt``, ``caption`` or ``text``.

    Empty lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, or no prompt in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt file {path}")
    if path.suffix not in READERS:
        raise ValueError(f"{path}: a prompt file must end in {', '.join(READERS)}")
    found = PromptFile([], [])
    reader = READERS[path.suffix]()
    for number, line in _lines(path):
        try:
            prompt = reader(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            if prompt is not None:
                found.prompts.append(_checked(prompt))
        except ValueError as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            found.broken.append(Broken(number, reason))
    if not found.prompts:
        first = f", first {found.broken[0].line}: {found.broken[0].reason}" if found.broken else ""
        raise ValueError(f"{path} holds no prompt ({len(found.broken)} broken lines{first})")
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.rstrip(b"\r\n")


def _checked(prompt: str) -> str:
    prompt = prompt.strip()
    if not prompt:
        raise ValueError("the prompt is empty")
    if len(prompt) > LONGEST:
        raise ValueError(f"the prompt has {len(prompt)} characters, at most {LONGEST} are read")
    if "\0" in prompt:
        raise ValueError("a zero byte in the prompt")
    return prompt


def _text() -> Callable[[str], str | None]:
    return lambda line: line


def _json() -> Callable[[str], str | None]:
    def read(line: str) -> str:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError("not valid JSON") from error
        named = [value[name] for name in COLUMNS if name in value] if isinstance(value, dict) else [value]
        if not named or not isinstance(named[0], str):
            raise ValueError(f"expected a text or an object with {', '.join(COLUMNS)}")
        named[0].encode()  # lone halves of surrogate pairs are no text: UnicodeEncodeError is a ValueError
        return named[0]

    return read


def _table() -> Callable[[str], str | None]:
    column: int | None = None
    first = True

    def read(line: str) -> str | None:
        nonlocal column, first
        cells = line.split("\t")
        if first:
            first = False
            names = [cell.strip().lower() for cell in cells]
            column = next((names.index(name) for name in COLUMNS if name in names), None)
            if column is not None:
                return None
        if column is not None:
            if len(cells) <= column:
                raise ValueError(f"{len(cells)} columns, the prompt is in column {column + 1}")
            return cells[column]
        if len(cells) < 4:
            raise ValueError(f"expected image, prompt, score and one more column, got {len(cells)}")
        _score(cells[2])
        return cells[1]

    return read


def _score(cell: str) -> None:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"the third column must be a number, got {cell[:40]!r}")


READERS: dict[str, Callable[[], Callable[[str], str | None]]] = {".tsv": _table, ".jsonl": _json, ".txt": _text}
"""By ending: makes what reads a line (None for a line that names columns)."""
