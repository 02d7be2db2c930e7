"""What parsers have in common: how they are called, and the folder of their files."""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Parser(NamedTuple):
    """One way into the package."""

    parse: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    errors: tuple[type[Exception], ...] = (ValueError,)


@cache
def folder() -> Path:
    """A folder for the files of this process."""
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def in_file(name: str, parse: Callable[[Path], object]) -> Callable[[bytes], object]:
    """``parse`` of a file with the content."""

    def call(content: bytes) -> object:
        path = folder() / name
        path.write_bytes(content)
        return parse(path)

    return call


def with_spoilt(files: Callable[[], dict[str, bytes]], name: str, parse: Callable[[Path], object]) -> Parser:
    """``parse`` of a folder with good files, one of them spoilt."""

    def call(content: bytes) -> object:
        place = folder() / f"with-{name}-{parse.__name__}"
        place.mkdir(exist_ok=True)
        for other, good in files().items():
            (place / other).write_bytes(content if other == name else good)
        return parse(place)

    return Parser(call, lambda: [files()[name]])
