"""Two processes in one training with something going wrong: python two_ranks.py FOLDER writes FOLDER/told.json.

A program of its own: it imports torch once and forks the processes of every scenario.
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from ranks import Spoil, fork, in_update, nan_in_one_rank, nothing
from safetensors.torch import load_file

from mfd_fast.cli import main
from mfd_fast.run_folder import RunFolder
from mfd_fast.storage import read_tensors
from mfd_fast.training import loop
from mfd_fast.training.distill import DistillTraining

SETTINGS = (
    *("model.options.width=16", "model.options.depth=1", "run.device=cpu", "run.threads=1", "run.tensorboard=false"),
    *("data.options.num_samples=200", "data.options.num_held_out=50", "run.patience_seconds=3", "teacher.updates=2"),
    *("teacher.batch_size=16", "distill.student_updates=6", "distill.cycle_auxiliary=2", "distill.batch_size=16"),
    *("distill.rollout.step_size=0.25", "distill.log_every=1", "distill.checkpoint_every=1"),
)


def command(name: str, run: Path) -> list[str]:
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    return [name, "--preset", "mixture-2d", "--run", str(run), "--resume", "auto", *options]


def disk_full(rank: int) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    loop.save_checkpoint = save


SCENARIOS: dict[str, Spoil] = {
    "undisturbed": nothing,
    "nan in one rank": nan_in_one_rank,
    "one dies": in_update(7, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "one hangs": in_update(7, lambda: time.sleep(8)),
    "disk full": disk_full,
    "signal to one": in_update(7, lambda: os.kill(os.getpid(), signal.SIGTERM)),
}


def start(run: Path, spoil: Spoil, name: str) -> tuple[list[int], list[str]]:
    """Exit codes and words of both ranks."""

    def work(rank: int) -> int:
        spoil(rank)
        keep_final(run.parent / f"{name}-{rank}.safetensors")
        return main(command("distill", run))

    codes = fork(2, f"{run.parent}/{name}", work)
    return codes, [(run.parent / f"{name}-{rank}.txt").read_text() for rank in (0, 1)]


def keep_final(path: Path) -> None:
    """Each rank keeps its own weights after its last update."""
    from mfd_fast.storage import write_tensors

    original = DistillTraining.run_update

    def run_update(self: Any, update: int) -> Any:
        result = original(self, update)
        if update + 1 == self.total_updates:
            write_tensors(
                path,
                {
                    f"{role}.{k}": v
                    for role in ("student", "auxiliary")
                    for k, v in self._roles.state_dict(role).items()
                },
            )
        return result

    DistillTraining.run_update = run_update  # type: ignore[method-assign]


def with_teacher(folder: Path, name: str) -> Path:
    run = folder / name.replace(" ", "-")
    child = os.fork()
    if child == 0:
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, 1)
        os._exit(main(command("train-teacher", run)))
    assert os.waitpid(child, 0)[1] == 0
    return run


def events(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" in line]


def examine(folder: Path, name: str, spoil: Spoil) -> dict[str, Any]:
    run = with_teacher(folder, name)
    began = time.monotonic()
    codes, said = start(run, spoil, name)
    told: dict[str, Any] = {"codes": codes, "said": said, "seconds": time.monotonic() - began}
    if codes == [0, 0]:
        a, b = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
        told |= {"equal": all(torch.equal(a[key], b[key]) for key in a), "events": events(run)}
    elif name in ("one dies", "signal to one"):
        codes, said = start(run, nothing, f"{name} resumed")
        whole = read_tensors(folder / "undisturbed" / "student.safetensors")
        ours = RunFolder(run).read_tensors("student") if codes == [0, 0] else {}
        same = ours.keys() == whole.keys() and all(torch.equal(ours[key], whole[key]) for key in whole)
        told["resumed"] = "same bits" if same else f"{codes} {said}"
    return told


if __name__ == "__main__":
    place = Path(sys.argv[1])
    told = {name: examine(place, name, spoil) for name, spoil in SCENARIOS.items()}
    (place / "told.json").write_text(json.dumps(told))
