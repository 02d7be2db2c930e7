"""What a stopped run says under a launcher."""

import argparse
import signal
import sys

import pytest

from mfd_fast.cli import main
from mfd_fast.training.interrupts import EXIT_RESUMABLE, Interrupted


@pytest.mark.parametrize(("rank", "speaks"), [(None, True), ("0", True), ("1", False)])
def test_one_process_says_that_a_run_was_stopped(
    rank: str | None, speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All processes stop together, and the words are the same in each."""

    def stop(options: argparse.Namespace) -> int:
        raise Interrupted(signal.SIGTERM, "stopped after 3 updates")

    parser = argparse.ArgumentParser()
    parser.set_defaults(command="distill", run_command=stop)
    monkeypatch.setattr(sys.modules["mfd_fast.cli.main"], "build_parser", lambda: parser)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert main([]) == EXIT_RESUMABLE
    assert ("stopped after 3 updates" in capsys.readouterr().err) is speaks
