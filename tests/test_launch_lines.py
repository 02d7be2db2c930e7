"""The launch commands of README and docs are taken by the launchers and by mfd-fast as they are printed."""

import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from mfd_fast.cli.main import build_parser, main

ROOT = Path(__file__).resolve().parents[1]
COMMAND = re.compile(r"(?m)^ *((?:torchrun|deepspeed) --.*)$|`((?:torchrun|deepspeed) --[^`]*)`")
PACKAGE = "mfd_fast"


def printed(launcher: str) -> list[tuple[str, list[str]]]:
    """File and words of every command; a command ends before "...", which stands for what the reader knows."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block, inline in COMMAND.findall(path.read_text("utf-8").replace("\\\n", " ")):
            words = shlex.split(block or inline, comments=True)
            if words[0] == launcher:
                found.append((path.name, words[1:]))
    return found


def check_program(words: list[str]) -> None:
    """``mfd_fast`` and its arguments; with "..." in them only the command has to be one."""
    assert words[0] == PACKAGE
    if "..." in words:
        words = [words[0], words[1], *(["runs/a"] if words[1] == "evaluate" else [])]
    assert build_parser().parse_args(words[1:]).command == words[1]


@pytest.mark.parametrize(("file", "words"), printed("torchrun"))
def test_torchrun(file: str, words: list[str]) -> None:
    options = get_args_parser().parse_args(words)
    assert options.module
    check_program([options.training_script, *options.training_script_args])


def test_what_is_printed_for_full_roles_of_sana_fits_on_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    """On cards of 24 GB, by the estimate of the very settings."""
    found = 0
    for _, words in printed("torchrun"):
        options = get_args_parser().parse_args(words)
        asked = options.training_script_args
        if "..." in asked or "distill.roles=lora-student" not in asked:
            continue
        found += 1
        given = build_parser().parse_args(asked)
        settings = [part for setting in given.set for part in ("--set", setting)]
        sharing = ["--gpus", options.nproc_per_node, "--zero", str(given.zero)]
        assert main(["estimate", "--preset", given.preset, *settings, *sharing]) == 0
        assert "fits in 24 GiB" in capsys.readouterr().out
    assert found == 1


@pytest.mark.parametrize(("file", "words"), printed("deepspeed"))
def test_deepspeed(file: str, words: list[str]) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner", reason="DeepSpeed is not installed (mfd_fast[zero])")
    options = runner.parse_args(words)
    assert options.module
    assert options.no_local_rank
    check_program([options.user_script, *options.user_args])


def test_every_page_is_read() -> None:
    assert {name for name, _ in printed("torchrun")} == {"README.md", "occfm.md", "sana.md", "zero.md"}
    assert len(printed("deepspeed")) == 2
