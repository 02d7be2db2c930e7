"""Kill real trainings at random moments, resume them, and compare what comes out with a run left alone.

``python tests/chaos/chaos.py --kills 200`` is the long version; ``test_chaos.py`` runs a short one. Everything that is
found wrong is an AssertionError.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mfd_fast.run_folder import RunFolder
from mfd_fast.training.checkpoint import latest_checkpoint, list_checkpoints, verify_checkpoint

SETTINGS = (
    *("model.options.width=16", "model.options.depth=1", "run.device=cpu", "run.threads=1", "run.tensorboard=false"),
    *("data.options.num_samples=200", "data.options.num_held_out=50", "run.patience_seconds=60"),
    *("teacher.updates=60", "teacher.batch_size=16", "teacher.log_every=1", "teacher.checkpoint_every=3"),
    *("distill.student_updates=30", "distill.cycle_auxiliary=2", "distill.batch_size=16", "distill.ema_decay=0.9"),
    *("distill.rollout.step_size=0.25", "distill.log_every=1", "distill.checkpoint_every=1"),
)
SIGNALS = [signal.SIGKILL] * 7 + [signal.SIGTERM] * 2 + [signal.SIGUSR1]
ACCEPTED = {
    signal.SIGKILL: {-signal.SIGKILL},
    # The second is for a process that is still starting and has not asked for signals.
    signal.SIGTERM: {75, -signal.SIGTERM},
    signal.SIGUSR1: {75, -signal.SIGUSR1},
}


class Server:
    """A fork server; one child at a time."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("fork_server.py")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self._read() == "ready"

    def start(self, **task: Any) -> int:
        """Start a child; its number."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def wait(self) -> int:
        """How the child ended: its exit code, or minus the signal."""
        return int(self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def fork_server() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()


def commands(run: Path) -> list[list[str]]:
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    return [
        [command, "--preset", "mixture-2d", "--run", str(run), "--resume", "auto", *options]
        for command in ("train-teacher", "distill")
    ]


def undisturbed(server: Server, folder: Path) -> Path:
    """A run left alone."""
    run = folder / "whole"
    server.start(commands=commands(run), output=str(folder / "whole.txt"))
    code = server.wait()
    assert code == 0, (folder / "whole.txt").read_text()
    return run


def hidden(run: Path) -> set[Path]:
    """Checkpoints that are being written or deleted, or were when a process was killed."""
    return set(run.glob("checkpoints/*/.update-*"))


def wait_for_the_moment(draw: random.Random, run: Path, before: set[Path], longest: float) -> None:
    """Half of the time any moment; else one inside a save."""
    inside = draw.random() < 0.5
    deadline = time.monotonic() + draw.uniform(0.0, longest)
    while time.monotonic() < deadline:
        time.sleep(0.002)
    while inside and not hidden(run) - before and time.monotonic() < deadline + 2.0:
        pass
    if inside:  # near its beginning or anywhere in it: a slowed save takes up to a fifth of a second
        time.sleep(draw.uniform(0.0, draw.choice([0.02, 0.2])))


def check_folder(run: Path) -> None:
    """Whatever was killed: all that has a name is whole."""
    folder = RunFolder(run)
    if (run / "settings.toml").is_file():
        folder.read_settings()
    for checkpoints in (folder.teacher_checkpoints(), folder.distill_checkpoints()):
        for path in list_checkpoints(checkpoints):
            verify_checkpoint(path)
    for role in ("teacher", "student"):
        if folder.has_network(role):
            folder.read_tensors(role)
    for name in ("log.jsonl", "teacher_log.jsonl"):
        lines = (run / name).read_text("utf-8").splitlines(keepends=True) if (run / name).is_file() else []
        for line in lines:
            if line.endswith("\n"):  # the last one may be cut
                json.loads(line)


def disturbed(server: Server, folder: Path, draw: random.Random, most: int, counts: Counter[str]) -> Path:
    """A run that is killed up to ``most`` times and then left alone."""
    run, output = folder / "parts", folder / "parts.txt"
    done = -1
    for _ in range(most):
        slow = draw.choice([0.0, 0.002, 0.01])
        before = hidden(run)
        child = server.start(commands=commands(run), output=str(output), slow_sync=slow)
        wait_for_the_moment(draw, run, before, longest=0.6)
        number = draw.choice(SIGNALS)
        os.kill(child, number)
        code = server.wait()
        if code == 0:
            counts["was over before it was killed"] += 1
            break
        assert code in ACCEPTED[number], (number, code, output.read_text()[-2000:])
        counts[signal.Signals(number).name] += 1
        # A save that was cut leaves its folder behind; the next one clears it away.
        counts["cut saves"] += number == signal.SIGKILL and bool(hidden(run) - before)
        check_folder(run)
        now = progress(run)
        assert now >= done, "saved updates were lost"
        done = now
    server.start(commands=commands(run), output=str(output))
    assert server.wait() == 0, output.read_text()[-2000:]
    return run


def progress(run: Path) -> int:
    """Updates that are saved, of both trainings."""
    folder = RunFolder(run)
    teacher, _ = latest_checkpoint(folder.teacher_checkpoints())
    student, _ = latest_checkpoint(folder.distill_checkpoints())
    return sum(0 if found is None else int(found.state["done"]) for found in (teacher, student))


def compare(run: Path, whole: Path) -> None:
    """The same bits in weights and states, the same lines in the logs, nothing left over."""
    for name in ("teacher.safetensors", "student.safetensors", "teacher.json", "student.json", "settings.toml"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("log.jsonl", "teacher_log.jsonl"):
        ours, theirs = (
            [_without_seconds(line) for line in (each / name).read_text().splitlines()] for each in (run, whole)
        )
        assert ours == theirs, name
        updates = [line["update"] for line in ours]
        assert updates == sorted(set(updates)), "every update once"
    for pick in (RunFolder.teacher_checkpoints, RunFolder.distill_checkpoints):
        (ours_last, skipped), (whole_last, _) = (latest_checkpoint(pick(RunFolder(each))) for each in (run, whole))
        assert skipped == []
        assert ours_last is not None
        assert whole_last is not None
        assert ours_last.state["done"] == whole_last.state["done"]
        for group, tensors in whole_last.tensors.items():
            assert tensors.keys() == ours_last.tensors[group].keys()
            assert all(bool((value == ours_last.tensors[group][name]).all()) for name, value in tensors.items()), group
        assert not [path for path in pick(RunFolder(run)).iterdir() if path.name.startswith(".")]


def _without_seconds(line: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(line)
    values.pop("seconds")
    return values


def chaos(kills: int, seed: int, most_in_a_run: int, say: bool = False) -> Counter[str]:
    """Disturb runs until ``kills`` kills have been survived; what happened, counted."""
    draw, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name, fork_server() as server:
        whole = undisturbed(server, Path(name))
        while (so_far := sum(counts[number.name] for number in ACCEPTED)) < kills:
            folder = Path(name) / f"run-{counts['runs']}"
            folder.mkdir()
            run = disturbed(server, folder, draw, min(most_in_a_run, kills - so_far), counts)
            compare(run, whole)
            counts["runs"] += 1
            if say:
                print(dict(counts), flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    counts = chaos(options.kills, options.seed, most_in_a_run=40, say=True)
    print(f"{options.kills} kills in {time.monotonic() - began:.0f} s: nothing lost. {dict(counts)}")


if __name__ == "__main__":
    main()
