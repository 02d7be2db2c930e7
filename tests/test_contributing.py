"""CONTRIBUTING.md names every file with lines that the coverage leaves out."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRAGMA = re.compile(r"#\s*pragma: no cover.*")


def test_lines_left_out_of_coverage_are_listed() -> None:
    package = ROOT / "mfd_fast"
    found = {
        path.relative_to(package).as_posix(): PRAGMA.findall(path.read_text("utf-8")) for path in package.rglob("*.py")
    }
    assert {pragma for pragmas in found.values() for pragma in pragmas} <= {"# pragma: no cover (gpu)"}
    listed = (
        (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("Files that have such lines:")[2].partition("\n*")[0]
    )
    assert set(re.findall(r"`(\S+\.py)`", listed)) == {name for name, pragmas in found.items() if pragmas}
