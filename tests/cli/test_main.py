import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mfd_fast
from mfd_fast.cli import look
from mfd_fast.cli.examples import EXAMPLES
from mfd_fast.cli.main import parse

COMMANDS = ("demo", "train-teacher", "distill", "sample", "evaluate", "report", "info", "doctor")


def test_version(cli: Any) -> None:
    assert cli("--version") == (0, f"mfd_fast {mfd_fast.__version__}\n", "")


def test_help_names_every_command(cli: Any) -> None:
    result = cli("--help")
    assert result.code == 0
    assert all(command in result.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(cli: Any, command: str) -> None:
    result = cli(command, "--help")
    assert result.code == 0
    assert f"mfd-fast {command}" in result.out


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_ends_with_examples_that_can_be_typed(cli: Any, command: str) -> None:
    out = cli(command, "--help").out
    for example in EXAMPLES[command]:
        assert f"\n  {example}\n" in out
        assert parse(shlex.split(example)[1:]).command == command


@pytest.mark.parametrize(
    "arguments",
    ["", "nothing", "demo --no-such-flag", "sample", "demo --seed x", "demo --resume --fresh", "doctor --json yes"],
)
def test_wrong_usage_is_exit_code_2(cli: Any, arguments: str) -> None:
    result = cli(*arguments.split())
    assert result.code == 2
    assert result.err.startswith("usage: mfd-fast")
    assert "error:" in result.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("distil --preset demo", "there is no command 'distil' (did you mean 'distill'?); all: mfd-fast --help"),
        (
            "distill --pipline SANA",
            "unknown argument '--pipline' (did you mean '--pipeline'?); all: mfd-fast distill --help",
        ),
        ("distill --pipline=SANA", "unknown argument '--pipline=SANA' (did you mean '--pipeline'?)"),
        ("checkpoint prune runs/a --keep-bets 2", "unknown argument '--keep-bets' (did you mean '--keep-best'?)"),
        ("report runs/a runs/b", "unknown argument 'runs/b'; all: mfd-fast report --help"),
    ],
)
def test_a_name_that_nearly_exists_is_told(cli: Any, arguments: str, words: str) -> None:
    result = cli(*arguments.split())
    assert result.code == 2
    assert words in result.err.splitlines()[-1]


ERRORS: dict[str, tuple[BaseException, int, str]] = {
    "value": (ValueError("one\n\ttwo"), 2, "mfd-fast info: one two\n"),
    "type": (TypeError("wrong"), 2, "mfd-fast info: wrong\n"),
    "file": (FileNotFoundError(2, "No such file", "x"), 2, "mfd-fast info: [Errno 2] No such file: 'x'\n"),
    "module": (ModuleNotFoundError("pip install it"), 2, "mfd-fast info: pip install it\n"),
    "disk": (OSError(28, "No space left"), 1, "mfd-fast info failed: [Errno 28] No space left\n"),
    "runtime": (RuntimeError("device lost"), 1, "mfd-fast info failed: device lost\n"),
    "numbers": (FloatingPointError("NaN"), 1, "mfd-fast info failed: NaN\n"),
    "silent": (RuntimeError(), 1, "mfd-fast info failed: RuntimeError\n"),
    "a whole log": (
        *(RuntimeError("error: " + "x" * 9989 + "\nlast"), 1),
        f"mfd-fast info failed: error: {'x' * 1993} [... 6001 characters ...] {'x' * 1995} last\n",
    ),
    "ctrl-c": (KeyboardInterrupt(), 130, "\nmfd-fast: stopped\n"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_expected_errors_are_one_line_and_a_code(cli: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    error, code, words = ERRORS[kind]

    def fail() -> None:
        raise error

    monkeypatch.setattr(look, "_print_names", fail)
    assert cli("info") == (code, "", words)


def test_a_mistake_of_the_package_shows_where_it_is(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(look, "_print_names", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli("info")


@pytest.mark.parametrize("how", ["module", "script"])
def test_it_can_be_started_as_a_program(how: str, tmp_path: Path) -> None:
    script = shutil.which("mfd-fast", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if how == "script" and script is None:
        pytest.skip("the package is not installed")
    command = [str(script)] if how == "script" else [sys.executable, "-m", "mfd_fast"]
    done = subprocess.run(
        [*command, "info", "nowhere"], capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "mfd-fast info: there is no run folder nowhere\n"
