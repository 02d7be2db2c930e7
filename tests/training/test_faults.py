"""Disks, folders, clocks and other processes that fail while a training runs."""

import ast
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mfd_fast
from mfd_fast.config import Settings
from mfd_fast.data import load_dataset
from mfd_fast.distillation import distill
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.run_folder import RunFolder
from mfd_fast.storage import only_writer
from mfd_fast.task import Task
from mfd_fast.training.checkpoint import latest_checkpoint, list_checkpoints
from mfd_fast.training.context import make_context
from mfd_fast.training.distill import DistillTraining
from mfd_fast.training.interrupts import Interrupted
from mfd_fast.training.teacher import TeacherTraining, train_teacher

Make = Callable[..., Settings]
Teacher = Callable[..., VelocityNetwork]
FULL = OSError(errno.ENOSPC, "No space left on device")


def same_student(a: RunFolder, b: RunFolder) -> bool:
    ours, theirs = a.read_tensors("student"), b.read_tensors("student")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("sync", [0, 1, 3, 8, 12, 15])
def test_a_full_disk_ends_the_run_and_nothing_saved_is_lost(
    sync: int,
    tmp_path: Path,
    tiny_settings: Make,
    tiny_teacher: Teacher,
    labelled_task: Task,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk is full from the fsync number ``sync`` of the second save on: in each of its files, and around them."""
    settings, run = tiny_settings("distill.checkpoint_every=1"), RunFolder(tmp_path / "run")
    real, calls = os.fsync, [0]

    def fsync(handle: int) -> None:
        if list_checkpoints(run.distill_checkpoints()):
            calls[0] += 1
            if calls[0] > sync:
                raise FULL
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(
            OSError, match=r"No space left on device: no checkpoint after [36] updates; those in .* stand"
        ):
            distill(tiny_teacher(3), settings, labelled_task, run.path)
    found, skipped = latest_checkpoint(run.distill_checkpoints())
    assert skipped == []
    assert found is not None
    assert found.state["done"] in (3, 6)
    distill(tiny_teacher(3), settings, labelled_task, run.path, resume=True)
    whole = RunFolder(tmp_path / "whole")
    distill(tiny_teacher(3), settings, labelled_task, whole.path)
    assert same_student(run, whole)


def test_a_full_disk_is_seen_through_the_library_that_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`safetensors` has an error of its own for it."""
    from safetensors import SafetensorError
    from safetensors import torch as library

    from mfd_fast.storage import write_tensors

    def save_file(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: IoError(Os { code: 28, message: No space left on device })")

    monkeypatch.setattr(library, "save_file", save_file)
    with pytest.raises(OSError, match=r"x\.safetensors could not be written: .*No space left on device"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_arrives_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import torch as library

    from mfd_fast.storage import write_tensors

    original = library.save_file

    def save_file(tensors: Any, path: Path) -> None:
        original(tensors, path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(library, "save_file", save_file)
    with pytest.raises(OSError, match="what is read back is not what was written"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_before_any_work(
    tmp_path: Path, tiny_settings: Make, tiny_teacher: Teacher, labelled_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    monkeypatch.setattr(DistillTraining, "run_update", lambda *_: pytest.fail("work before the folder was tried"))
    with pytest.raises(OSError, match="Read-only file system"):
        distill(tiny_teacher(3), tiny_settings(), labelled_task, tmp_path / "run")


def test_data_files_are_not_needed_once_read(tmp_path: Path, tiny_settings: Make) -> None:
    folder = tmp_path / "cifar"
    folder.mkdir()
    for name in [*(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin"]:
        (folder / name).write_bytes(bytes([3]) + bytes(3072) + bytes([4]) + bytes([255]) * 3072)
    settings = tiny_settings("teacher.updates=2", "teacher.batch_size=2")
    data = load_dataset("cifar10", folder)
    shutil.rmtree(folder)
    train_teacher(settings, data, RunFolder(tmp_path / "run"), make_context(settings.run))
    with pytest.raises(FileNotFoundError, match=r"cifar does not exist"):
        load_dataset("cifar10", folder)


def test_the_time_limit_saves_and_the_rest_gives_the_same_bits(
    tmp_path: Path, tiny_settings: Make, tiny_teacher: Teacher, labelled_task: Task
) -> None:
    run, whole = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "whole")
    for done in (1, 2, 3):  # every start gets an update done
        with pytest.raises(Interrupted, match=f"stopped after {done} of 18 updates, the time limit is reached") as stop:
            distill(tiny_teacher(3), tiny_settings("run.max_seconds=0.000001"), labelled_task, run.path, resume="auto")
        assert stop.value.exit_code == 75
    distill(tiny_teacher(3), tiny_settings(), labelled_task, run.path, resume=True)
    distill(tiny_teacher(3), tiny_settings(), labelled_task, whole.path)
    assert same_student(run, whole)


def test_a_clock_that_is_set_changes_nothing(
    tmp_path: Path, tiny_settings: Make, tiny_teacher: Teacher, labelled_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 1e8)
    run = RunFolder(tmp_path / "run")
    distill(tiny_teacher(3), tiny_settings("run.max_seconds=1000"), labelled_task, run.path)
    lines = [json.loads(line)["seconds"] for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert lines == sorted(lines)
    assert 0 <= lines[0] <= lines[-1] < 100


def test_no_module_reads_a_clock_that_can_be_set() -> None:
    forbidden = {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.now", "datetime.utcnow", "date.today"}
    found = [
        (path.name, ast.unparse(node.func))
        for path in Path(mfd_fast.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in forbidden
    ]
    assert found == []


def test_two_runs_do_not_write_into_one_folder(
    tmp_path: Path, tiny_settings: Make, tiny_teacher: Teacher, labelled_task: Task
) -> None:
    with only_writer(tmp_path / "run"), pytest.raises(RuntimeError, match=r"another process is at work in .*run"):
        distill(tiny_teacher(3), tiny_settings(), labelled_task, tmp_path / "run")
    distill(tiny_teacher(3), tiny_settings(), labelled_task, tmp_path / "run", resume="auto")


def test_the_lock_ends_with_the_process_that_had_it(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:  # killed while it holds the lock
        with only_writer(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with only_writer(tmp_path):
        pass


def test_a_state_of_another_kind_is_refused(
    tmp_path: Path, tiny_settings: Make, tiny_teacher: Teacher, labelled_task: Task
) -> None:
    from mfd_fast.training.checkpoint import save_checkpoint

    run = RunFolder(tmp_path / "run")
    distill(tiny_teacher(3), tiny_settings(), labelled_task, run.path)
    found, _ = latest_checkpoint(run.distill_checkpoints())
    assert found is not None
    (run.path / "student.json").unlink()
    for change in ({"fingerprint": 3}, {"done": None}, {"training": {}}):
        save_checkpoint(run.distill_checkpoints(), 18, found.tensors, {**found.state, **change}, keep=1)
        with pytest.raises(ValueError, match=r"is not that of a training|does not fit this training"):
            distill(tiny_teacher(3), tiny_settings(), labelled_task, run.path, resume=True)


@pytest.mark.parametrize("training", [TeacherTraining, DistillTraining])
def test_versions_are_kept_with_run_and_checkpoint(
    training: Any, tmp_path: Path, tiny_settings: Make, tiny_teacher: Teacher, labelled_task: Task
) -> None:
    run, settings = RunFolder(tmp_path / "run"), tiny_settings()
    if training is TeacherTraining:
        train_teacher(settings, load_dataset("mixture-2d", num_samples=50), run, make_context(settings.run))
        found, _ = latest_checkpoint(run.teacher_checkpoints())
    else:
        distill(tiny_teacher(3), settings, labelled_task, run.path)
        found, _ = latest_checkpoint(run.distill_checkpoints())
        every = json.loads((run.path / "installed.json").read_text())
        assert every["torch"] == torch.__version__
        assert len(every) > 20
    assert found is not None
    assert found.state["versions"]["torch"] == torch.__version__


def test_ranks_fail_together(tmp_path: Path) -> None:
    """Two processes: NaN in one, one that dies, one that hangs, a disk that is full, a signal to one of them."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "MASTER"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("two_ranks.py")), str(tmp_path)],
        env=clean | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())

    assert told["undisturbed"]["codes"] == [0, 0]
    assert told["nan in one rank"]["codes"] == [0, 0]
    assert told["nan in one rank"]["equal"], "the weights of both are the same"
    (event,) = told["nan in one rank"]["events"]
    assert (event["update"], event["skipped_role"], event["cause"], event["sample"]) == (5, "auxiliary", "loss", 13)

    for fault in ("one dies", "one hangs"):
        codes, said = told[fault]["codes"], told[fault]["said"]
        assert codes[0] == 1, said
        assert "another process of this run is gone, or did not answer within run.patience_seconds" in said[0]
        assert told[fault]["seconds"] < 60
    assert told["one dies"]["codes"][1] == -9

    assert told["disk full"]["codes"] == [1, 1]
    assert "No space left" in told["disk full"]["said"][0]
    assert "the main process could not save" in told["disk full"]["said"][1]
    assert told["signal to one"]["codes"] == [75, 75]
    for fault in ("one dies", "signal to one"):
        assert told[fault]["resumed"] == "same bits", fault
