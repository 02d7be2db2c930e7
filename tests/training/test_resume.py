"""A training that is stopped and resumed equals one that was left alone, bit for bit."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast.config import Settings
from mfd_fast.data import load_dataset
from mfd_fast.distillation import distill
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.run_folder import RunFolder
from mfd_fast.task import Task
from mfd_fast.training.checkpoint import latest_checkpoint, list_checkpoints, save_checkpoint
from mfd_fast.training.context import make_context
from mfd_fast.training.distill import DistillTraining
from mfd_fast.training.interrupts import Interrupted
from mfd_fast.training.teacher import TeacherTraining, train_teacher

Make = Callable[..., Settings]
Teacher = Callable[..., VelocityNetwork]
StopAfter = Callable[..., None]
FinalState = Callable[[RunFolder, str], dict[str, Tensor]]
ReadLog = Callable[[Path], list[dict[str, Any]]]

KINDS = {
    "full-average": ("distill.roles=full", "distill.ema_decay=0.9"),
    "lora": ("distill.roles=lora", "distill.lora_rank=2"),
    "lora-average-accumulated": (
        *("distill.roles=lora", "distill.lora_rank=2", "distill.ema_decay=0.9"),
        "distill.accumulation=2",
    ),
    "lora-student": ("distill.roles=lora-student", "distill.lora_rank=2", "distill.ema_decay=0.9"),
    "few-steps-bfloat16": ("distill.student_steps=2", "distill.grad_steps=1", "distill.precision=bfloat16"),
    "float16": ("distill.precision=float16",),
}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize(
    ("kind", "stop"),
    [
        *(("full-average", stop) for stop in (1, 4, 6, 17)),
        *(("lora-average-accumulated", stop) for stop in (2, 5)),
        *(("lora", 4), ("lora-student", 5), ("few-steps-bfloat16", 4), ("float16", 4)),
    ],
)
def test_resumed_distillation_has_the_same_bits(
    kind: str,
    stop: int,
    tmp_path: Path,
    tiny_settings: Make,
    tiny_teacher: Teacher,
    labelled_task: Task,
    stop_after: StopAfter,
    final_state: FinalState,
    read_log: ReadLog,
) -> None:
    settings = tiny_settings(*KINDS[kind], "distill.guidance_scale=1.5", "distill.student_optimizer.schedule=cosine")
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    distill(tiny_teacher(3), settings, labelled_task, whole.path)
    stop_after(DistillTraining, stop)
    with pytest.raises(Interrupted, match=f"stopped after {stop} of 18 updates") as caught:
        distill(tiny_teacher(3), settings, labelled_task, parts.path)
    assert caught.value.exit_code == 75
    assert not parts.has_network("student")
    distill(tiny_teacher(3), settings, labelled_task, parts.path, resume=True)
    assert_same_bits(final_state(parts, "student"), final_state(whole, "student"))
    assert read_log(parts.path / "log.jsonl") == read_log(whole.path / "log.jsonl")


@pytest.mark.parametrize("stop", [1, 7])
def test_resumed_teacher_has_the_same_bits(
    stop: int, tmp_path: Path, tiny_settings: Make, stop_after: StopAfter, final_state: FinalState, read_log: ReadLog
) -> None:
    settings = tiny_settings("teacher.optimizer.warmup_updates=5")
    dataset, context = load_dataset("mixture-2d", num_samples=50), make_context(settings.run)
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    train_teacher(settings, dataset, whole, context)
    stop_after(TeacherTraining, stop, signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        train_teacher(settings, dataset, parts, context)
    assert caught.value.exit_code == 130
    train_teacher(settings, dataset, parts, context, resume=True)
    assert_same_bits(final_state(parts, "teacher"), final_state(whole, "teacher"))
    assert read_log(parts.path / "teacher_log.jsonl") == read_log(whole.path / "teacher_log.jsonl")


@pytest.fixture
def stopped(
    tmp_path: Path, tiny_settings: Make, tiny_teacher: Teacher, labelled_task: Task, stop_after: StopAfter
) -> Callable[..., tuple[RunFolder, Callable[..., None]]]:
    """A distillation stopped after 7 of 18 updates, with a checkpoint per student update, and what resumes it."""

    def make(*overrides: str) -> tuple[RunFolder, Callable[..., None]]:
        run = RunFolder(tmp_path / "run")

        def start(*more: str, resume: Any = True) -> None:
            settings = tiny_settings("distill.checkpoint_every=1", *overrides, *more)
            distill(tiny_teacher(3), settings, labelled_task, run.path, resume=resume)

        stop_after(DistillTraining, 7)
        with pytest.raises(Interrupted):
            start(resume=False)
        return run, start

    return make


def test_checkpoint_holds_everything(stopped: Any) -> None:
    run, _ = stopped("distill.ema_decay=0.9")
    checkpoint, _ = latest_checkpoint(run.distill_checkpoints())
    groups = {"auxiliary", "student", "optimizer_auxiliary", "optimizer_student", "student_average"}
    assert checkpoint.tensors.keys() == groups
    assert all(checkpoint.tensors[group] for group in groups)
    assert checkpoint.state["done"] == 7
    assert checkpoint.state["training"]["auxiliary"]["updates"] == 5
    assert checkpoint.state["training"]["student"]["updates"] == 2
    assert {path.name for path in checkpoint.path.iterdir()} == {
        *(f"{group}.safetensors" for group in groups),
        "state.json",
        "manifest.json",
    }


@pytest.mark.parametrize(
    "group", ["auxiliary", "student", "optimizer_auxiliary", "optimizer_student", "student_average"]
)
def test_checkpoint_without_a_role_is_refused(stopped: Any, group: str) -> None:
    run, start = stopped("distill.ema_decay=0.9")
    checkpoint, _ = latest_checkpoint(run.distill_checkpoints())
    tensors = {name: part for name, part in checkpoint.tensors.items() if name != group}
    save_checkpoint(run.distill_checkpoints(), 7, tensors, checkpoint.state, keep=1)
    with pytest.raises(
        ValueError, match=rf"update-000007\.1 lacks {group}: this training cannot continue .*needed: .*{group}.*there: "
    ):
        start()


def test_damaged_newest_checkpoint_is_skipped(
    stopped: Any,
    tmp_path: Path,
    tiny_settings: Make,
    tiny_teacher: Teacher,
    labelled_task: Task,
    capsys: pytest.CaptureFixture[str],
    final_state: FinalState,
    read_log: ReadLog,
) -> None:
    run, start = stopped()
    newest = list_checkpoints(run.distill_checkpoints())[-1]
    assert newest.name == "update-000007"
    content = bytearray((newest / "student.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "student.safetensors").write_bytes(content)
    capsys.readouterr()
    start()
    said = capsys.readouterr().out
    assert "skipped update-000007" in said
    assert "student.safetensors is damaged" in said
    assert "resumed after 6 updates" in said
    whole = RunFolder(tmp_path / "whole")
    distill(tiny_teacher(3), tiny_settings("distill.checkpoint_every=1"), labelled_task, whole.path)
    assert_same_bits(final_state(run, "student"), final_state(whole, "student"))
    assert read_log(run.path / "log.jsonl") == read_log(whole.path / "log.jsonl")


def test_all_checkpoints_damaged_means_a_new_start(stopped: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run, start = stopped()
    for path in list_checkpoints(run.distill_checkpoints()):
        (path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"nothing to resume in .*skipped update-000007.*skipped update-000006.*auto"):
        start()
    start(resume="auto")
    said = capsys.readouterr().out
    assert said.count("skipped update-") == 2
    assert "nothing to resume" in said
    assert run.has_network("student")


def test_other_settings_are_refused_with_both_values(stopped: Any) -> None:
    _, start = stopped()
    with pytest.raises(ValueError, match=r"belongs to other settings.*distill\.batch_size was 16, is 32") as caught:
        start("distill.batch_size=32")
    assert len(str(caught.value)) < 400, "only what differs is named"
    with pytest.raises(ValueError, match=r"seed was 0, is 5"):
        start("run.seed=5")
    with pytest.raises(ValueError, match=r"distill\.student_optimizer\.learning_rate was 0\.0005, is 0\.1"):
        start("distill.student_optimizer.learning_rate=0.1")


def test_changed_thread_count_is_stated(stopped: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    _, start = stopped()
    torch.set_num_threads(2)
    start()
    assert "resumed, but no longer bit for bit as without a stop: threads was 1, is 2" in capsys.readouterr().out


def test_unchanged_resume_says_nothing_about_exactness(stopped: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, start = stopped()
    capsys.readouterr()
    start()
    said = capsys.readouterr().out
    assert "resumed after 7 updates" in said
    assert "bit for bit" not in said


def test_resume_of_a_finished_training_only_writes_the_student(stopped: Any, read_log: ReadLog) -> None:
    run, start = stopped()
    start()
    log, student = read_log(run.path / "log.jsonl"), run.read_tensors("student")
    (run.path / "student.json").unlink()
    start()
    assert read_log(run.path / "log.jsonl") == log
    assert_same_bits(run.read_tensors("student"), student)


def test_distilling_again_without_resume_is_refused(stopped: Any) -> None:
    _, start = stopped()
    with pytest.raises(ValueError, match="already holds a distillation: pass resume=True"):
        start(resume=False)
