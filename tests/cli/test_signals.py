"""Real signals to a real process."""

import json
import os
import random
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


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "mfd_fast", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_it_trains(process: "subprocess.Popen[str]", log: Path) -> None:
    """Return after a line of the log has been written by ``process``."""
    size = log.stat().st_size if log.is_file() else 0
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size > size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)], ids=str)
def test_a_signal_saves_and_the_resumed_run_has_the_same_bits(
    number: int, code: int, whole: Path, finished_points: Path, cli: Any, points: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["distill", "--run", str(run), "--teacher-run", str(finished_points), *points, *MORE]
    process = start(arguments)
    try:
        wait_until_it_trains(process, run / "log.jsonl")
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in said
    assert "distillation stopped after " in said
    assert "The same command with --resume auto goes on from there." in said
    assert not (run / "student.json").exists()
    result = cli(*arguments, "--resume")
    assert result.code == 0
    assert "distillation: resumed after " in result.out
    assert (run / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()


@pytest.mark.timeout(180)
def test_a_reader_that_has_gone_loses_nothing(
    whole: Path, finished_points: Path, cli: Any, points: list[str], tmp_path: Path
) -> None:
    """As ``mfd-fast distill ... | head -1`` has it: saved, with the reason for whoever reads the errors."""
    run = tmp_path / "run"
    arguments = ["distill", "--run", str(run), "--teacher-run", str(finished_points), *points, *MORE]
    with start(arguments) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("distillation: ")
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 75
    assert "updates, nobody reads its output any more; it is saved in" in said
    assert "Traceback" not in said
    assert "BrokenPipeError" not in said
    assert cli(*arguments, "--resume").code == 0
    assert (run / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_kills_at_random_moments_lose_nothing(
    whole: Path, finished_points: Path, cli: Any, points: list[str], tmp_path: Path
) -> None:
    """With a checkpoint after every student update, many of the kills hit a save."""
    run, draw = tmp_path / "run", random.Random(0)
    often = ["--set", "distill.checkpoint_every=1", "--set", "distill.log_every=1"]
    arguments = ["distill", "--run", str(run), "--teacher-run", str(finished_points), *points, *MORE, *often]
    for _ in range(5):
        process = start([*arguments, "--resume", "auto"])
        try:
            wait_until_it_trains(process, run / "log.jsonl")
            time.sleep(draw.uniform(0.0, 0.15))
        finally:
            process.kill()
            process.communicate()
        assert not (run / "student.json").exists(), "the run was over before it could be killed"
    result = cli(*arguments, "--resume")
    assert result.code == 0
    assert "distillation: resumed after " in result.out
    assert (run / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
    updates = [json.loads(line)["update"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert updates == sorted(set(updates))
    assert not [path for path in (run / "checkpoints" / "distill").iterdir() if path.name.startswith(".")]
