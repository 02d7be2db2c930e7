"""Distillations with roles that DeepSpeed shares out: python zero_ranks.py FOLDER writes FOLDER/told.json.

A program of its own: it imports DeepSpeed once and forks the processes of every scenario.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch._dynamo
from deepspeed.accelerator import get_accelerator  # once, before the forks
from ranks import Spoil, fork, in_update, nan_in_one_rank, nothing
from torch.nn import functional
from zero_memory import measure_all

from mfd_fast.cli import main
from mfd_fast.storage import write_json
from mfd_fast.training import zero
from mfd_fast.training.checkpoint import list_checkpoints
from mfd_fast.training.distill import DistillTraining

SETTINGS = (
    # Two processes cannot share out biases of 15 numbers evenly.
    *("model.options.width=15", "model.options.depth=1", "run.device=cpu", "run.threads=1", "run.tensorboard=false"),
    *("data.options.num_samples=200", "data.options.num_held_out=50", "run.patience_seconds=20", "teacher.updates=30"),
    *("teacher.batch_size=16", "distill.student_updates=7", "distill.cycle_auxiliary=2", "distill.batch_size=16"),
    *("distill.rollout.step_size=0.25", "distill.ema_decay=0.5", "distill.accumulation=2", "distill.student_steps=2"),
    *("distill.checkpoint_every=3", "distill.keep_checkpoints=9", "distill.student_optimizer.clip_norm=0.05"),
)

zero.BUCKET, zero.GROUP = 400, 200  # several messages, several groups of the optimiser

LINEAR = functional.linear

CUT = 9
"""The update from whose checkpoint runs are resumed."""


def run(folder: Path, processes: int, *options: str, spoil: Spoil = nothing, command: str = "distill") -> list[int]:
    """Exit codes of the command's processes; what each says goes to ``FOLDER-RANK.txt``."""

    def work(rank: int) -> int:
        spoil(rank)
        watch(Path(f"{folder}-{rank}.json"))
        chosen = [part for setting in SETTINGS for part in ("--set", setting)]
        return main([command, "--preset", "mixture-2d", "--run", str(folder), "--resume", "auto", *chosen, *options])

    return fork(processes, str(folder), work)


def watch(path: Path) -> None:
    """Every update is logged; which role's weights it changed in this process, and whether the weights of a rollout
    of a sharded role ever moved in memory, is kept in ``path``.
    """
    original, seen = DistillTraining.run_update, []

    def run_update(self: Any, update: int) -> Any:
        if not self._sharded:
            return original(self, update)
        parts = self._sharded
        before = {role: [part.detach().clone() for part in trained(self, role)] for role in self._trained}
        where = [p.data_ptr() for sharded in parts.values() for p in sharded.rollout.parameters()]
        result = original(self, update)
        changed = [
            role
            for role in self._trained
            if not all(torch.equal(a, b) for a, b in zip(before[role], trained(self, role), strict=True))
        ]
        here = [p.data_ptr() for sharded in parts.values() for p in sharded.rollout.parameters()]
        seen.append({"role": result.role, "changed": changed, "moved": here != where, **stale(parts, result.role)})
        seen[-1]["linear is torch's"] = functional.linear is LINEAR
        if update + 1 == self.total_updates:
            write_json(path, seen)
        return result

    DistillTraining.run_update = run_update  # type: ignore[method-assign]
    DistillTraining.log_due = lambda self, update: True  # type: ignore[method-assign]


def trained(training: Any, role: str) -> list[Any]:
    """The float32 weights of a role, of a sharded one this process's share."""
    sharded = training._sharded.get(role)
    return training._roles.parameters(role) if sharded is None else sharded.masters


def stale(parts: dict[str, Any], role: str) -> dict[str, Any]:
    """By how much the rollouts' weights of the roles that this update did not train differ from the float32 ones."""
    gap = 0.0
    for other, sharded in parts.items():
        if other != role:
            whole = sharded.gathered(everywhere=True)
            for copied, value in zip(sharded.rollout.parameters(), whole, strict=True):
                gap = max(gap, (copied.detach() - value.to(copied.dtype)).abs().max().item())
    return {"gap": gap}


def half_precision(rank: int) -> None:
    """DeepSpeed asks whether the processor has instructions for float16; torch computes it without them too."""
    get_accelerator().is_fp16_supported = lambda: True  # type: ignore[method-assign]


def cut(source: Path, target: Path) -> Path:
    """A copy of a finished run as it was after `CUT` updates."""
    shutil.copytree(source, target)
    for path in list_checkpoints(target / "checkpoints" / "distill"):
        if int(path.name.split("-")[1]) > CUT:
            shutil.rmtree(path)
    for name in ("student.safetensors", "student.json"):
        (target / name).unlink()
    return target


RESUMES: dict[str, tuple[str, int, int]] = {
    "another number": ("two-2", 1, 2),
    "another stage": ("two-2", 2, 3),
    "as a whole": ("two-3", 1, 0),
    "less shared out": ("two-3", 2, 1),
    "from a whole": ("one", 2, 3),
    "the same": ("two-2-fp16", 2, 2),
    "beside LoRA, another stage": ("lora-3", 2, 2),
    "beside LoRA, as a whole": ("lora-2", 1, 0),
    "a batch that cannot be split": ("two-2", 3, 2),
}
"""Which run is resumed after `CUT` updates, on how many processes, in which stage."""


def resume(folder: Path, name: str) -> list[int]:
    """Exit codes of a resumed run."""
    source, processes, stage = RESUMES[name]
    options = [*(SCENARIOS[source][1][2:]), *(["--zero", str(stage)] if stage else [])]
    spoil = half_precision if source.endswith("fp16") else nothing
    return run(cut(folder / source, folder / name), processes, *options, spoil=spoil)


LORA_STUDENT = ("--set", "distill.roles=lora-student", "--set", "distill.lora_rank=4")
"""A low-rank student beside a whole auxiliary."""

SCENARIOS: dict[str, tuple[int, tuple[str, ...], Spoil]] = {
    "one": (1, (), nothing),
    "two-1": (2, ("--zero", "1"), nothing),
    "two-2": (2, ("--zero", "2"), nothing),
    "two-3": (2, ("--zero", "3"), nothing),
    "offload": (2, ("--zero", "2", "--zero-offload"), nothing),
    "one-bf16": (1, ("--set", "distill.precision=bfloat16"), nothing),
    "two-3-bf16": (2, ("--zero", "3", "--set", "distill.precision=bfloat16"), nothing),
    "one-fp16": (1, ("--set", "distill.precision=float16"), nothing),
    "two-2-fp16": (2, ("--zero", "2", "--set", "distill.precision=float16"), half_precision),
    "lora-one": (1, LORA_STUDENT, nothing),
    "lora-2": (2, ("--zero", "2", *LORA_STUDENT), nothing),
    "lora-3": (2, ("--zero", "3", *LORA_STUDENT), nothing),
    "nan": (2, ("--zero", "3"), nan_in_one_rank),
    "dies": (2, ("--zero", "2"), in_update(13, lambda: os.kill(os.getpid(), signal.SIGKILL))),
    "hangs": (2, ("--zero", "2", "--set", "run.patience_seconds=3"), in_update(13, lambda: time.sleep(9))),
}


def examine(folder: Path) -> dict[str, Any]:
    """All scenarios; by name exit codes and seconds."""
    assert run(folder / "teacher", 1, command="train-teacher") == [0], (folder / "teacher-0.txt").read_text()
    told: dict[str, Any] = {"memory": measure_all(folder)}
    for name, (processes, options, spoil) in SCENARIOS.items():
        shutil.copytree(folder / "teacher", folder / name)
        began = time.monotonic()
        codes = run(folder / name, processes, *options, spoil=spoil)
        told[name] = {"codes": codes, "seconds": time.monotonic() - began}
    return told | {name: {"codes": resume(folder, name)} for name in RESUMES}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "told.json").write_text(json.dumps(examine(place)))
