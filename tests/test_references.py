"""What comments, docstrings and pages refer to exists: dotted names in backticks, and paths of the repository."""

import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mfd_fast", "kernels", "csrc", "benchmarks", "docs", "examples", "tests")
MADE_LATER = ("benchmarks/fields",)
"""What programs make."""


def texts() -> Iterator[tuple[str, str]]:
    """Name and content of every page and of every source but those of tests, which also name what must not exist."""
    sources = (path for folder in FOLDERS if folder != "tests" for path in (ROOT / folder).rglob("*"))
    for path in [*ROOT.glob("*.md"), *sources]:
        if path.suffix in (".py", ".md", ".cpp", ".hpp", ".pyi"):
            yield str(path.relative_to(ROOT)), path.read_text("utf-8")


def exists(name: str) -> bool:
    """Whether a dotted name leads to something; fields of classes have no value but an annotation."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        owner, _, last = name.rpartition(".")
        return "." in owner and last in getattr(pkgutil.resolve_name(owner), "__annotations__", {})
    return True


def test_dotted_names_exist() -> None:
    found = {(name, of) for of, text in texts() for name in re.findall(r"`(mfd_fast(?:\.\w+)+)", text)}
    assert len(found) > 100  # the pattern finds what is there
    assert [(name, of) for name, of in sorted(found) if not exists(name)] == []


def test_paths_exist() -> None:
    pattern = rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)(?![\w*<{{}}-])"
    found = {(path, of) for of, text in texts() for path in re.findall(pattern, text)}
    assert len(found) > 100
    missing = [(path, of) for path, of in sorted(found) if not (ROOT / path).exists() and path not in MADE_LATER]
    assert missing == []
