"""What `make test-compat` installs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def printed(age: str) -> "subprocess.CompletedProcess[str]":
    script = Path(__file__).with_name("requirements.py")
    return subprocess.run([sys.executable, str(script), age], capture_output=True, text=True, check=False)


def test_the_declared_range_has_two_ends() -> None:
    newest, oldest = (printed(age).stdout.split() for age in ("newest", "oldest"))
    assert [re.split("[>=<]", text)[0] for text in newest] == ["diffusers", "transformers", "peft"]
    assert re.fullmatch(r"diffusers>=[0-9.]+,<[0-9.]+", newest[0])
    for declared, pinned in zip(newest, oldest, strict=True):
        assert pinned.replace("==", ">=") == declared.partition(",")[0]


def test_another_age_is_refused() -> None:
    assert "age must be oldest or newest, got 'older'" in printed("older").stderr


@pytest.mark.parametrize("line", re.findall(r"tests/\S+\.py", (ROOT / "Makefile").read_text("utf-8")))
def test_the_tests_are_there(line: str) -> None:
    assert (ROOT / line).is_file()
