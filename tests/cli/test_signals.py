"""Real signals to a real process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mfd_fast.cli import main

MORE = [
    part
    for setting in ("distill.student_updates=150", "distill.ema_decay=0.9", "run.threads=1", "distill.log_every=5")
    for part in ("--set", setting)
]


@pytest.fixture(scope="module")
def whole(finished_points: Path, points: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it is without any signal."""
    run = tmp_path_factory.mktemp("whole") / "run"
    arguments = ["distill", "--run", str(run), "--teacher-run", str(finished_points), *points, *MORE]
    assert main(arguments) == 0
    return run


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_resumed_run_has_the_same_bits(
    number: int, code: int, whole: Path, finished_points: Path, cli: Any, points: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["distill", "--run", str(run), "--teacher-run", str(finished_points), *points, *MORE]
    process = subprocess.Popen(
        [sys.executable, "-m", "mfd_fast", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not ((run / "log.jsonl").is_file() and (run / "log.jsonl").stat().st_size > 0):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in said
    assert "distillation stopped after " in said
    assert "The same command with --resume goes on from there." in said
    assert not (run / "student.json").exists()
    result = cli(*arguments, "--resume")
    assert result.code == 0
    assert "distillation: resumed after " in result.out
    assert (run / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
