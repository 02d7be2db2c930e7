"""The oldest or the newest versions of the libraries that the extra "sana" declares, one requirement a line for pip."""

import re
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def requirements(age: str, declared: list[str]) -> list[str]:
    """``declared`` as it is for "newest", pinned to its lower bounds for "oldest".

    Raises:
        ValueError: another age, or a library without a lower bound.
    """
    if age not in ("oldest", "newest"):
        raise ValueError(f"age must be oldest or newest, got {age!r}")
    if age == "newest":
        return declared
    found = [re.fullmatch(r"([A-Za-z0-9_-]+)>=([0-9.]+)(,<[0-9.]+)?", text) for text in declared]
    if None in found:
        raise ValueError(f"every library must be declared as NAME>=LOWEST, got {declared}")
    return [f"{match[1]}=={match[2]}" for match in found if match]


def main() -> None:
    """Print the requirements of the age that is the only argument."""
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print("\n".join(requirements(sys.argv[1], project["optional-dependencies"]["sana"])))


if __name__ == "__main__":
    main()
