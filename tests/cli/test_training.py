"""``train-teacher`` and ``distill``: settings, folders, teachers of one's own, resume and fresh."""

import json
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mfd_fast import load_student
from mfd_fast.models import build_model
from mfd_fast.run_folder import RunFolder
from mfd_fast.storage import delete_folder, write_tensors
from mfd_fast.training.distill import DistillTraining
from mfd_fast.training.teacher import TeacherTraining

USER_CODE = """
from mfd_fast.models import build_model


def make():
    return build_model("mlp", (2,), None, width=8, depth=1)


def three():
    return 3
"""


@pytest.fixture(autouse=True)
def _user_module(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "own_teacher.py").write_text(USER_CODE)
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("own_teacher", None)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    model = build_model("mlp", (2,), None, width=8, depth=1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    write_tensors(tmp_path / "weights.safetensors", model.state_dict())
    return tmp_path / "weights.safetensors"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_settings_come_from_preset_file_and_flags(cli: Any, points: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('preset = "mixture-2d"\n[teacher]\nupdates = 3\nlog_every = 1\n')
    result = cli("train-teacher", *points, "--settings", "mine.toml", "--set", "teacher.updates=2")
    assert result.code == 0
    assert "teacher in runs/mixture-2d/teacher.safetensors; next: mfd-fast distill" in result.out
    kept = RunFolder(Path("runs/mixture-2d")).read_settings()
    assert (kept.preset, kept.teacher.updates, kept.teacher.log_every) == ("mixture-2d", 2, 1)
    assert [line["update"] for line in lines(Path("runs/mixture-2d/teacher_log.jsonl"))] == [1, 2]


WRONG_SETTINGS = {
    "unknown key": (
        ["--set", "distill.batchsize=3"],
        "unknown setting 'distill.batchsize'; did you mean 'distill.batch_size'?",
    ),
    "wrong type": (["--set", "distill.batch_size=many"], "distill.batch_size must be int, at least 1; got 'many'"),
    "no value": (["--set", "distill.batch_size"], "a setting must be given as key=value; got 'distill.batch_size'"),
    "unknown preset": (["--preset", "demmo"], "got 'demmo' (did you mean 'demo'?)"),
    "no file": (["--settings", "none.toml"], "--settings: there is no file none.toml"),
    "unknown method": (["--set", "distill.method=mdf"], "did you mean 'mfd'?"),
    "unknown solver": (["--set", "distill.rollout.solver=eulr"], "'euler'"),
    "unknown model": (["--set", "model.name=mlpp"], "'mlp'"),
    "unknown model option": (["--set", "model.options.widht=3"], "'width'"),
    "unknown dataset": (["--set", "data.name=digit"], "did you mean 'digits'?"),
    "no such device": (["--set", "run.device=gpu"], "run.device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
    "batch that cannot be split": (
        ["--set", "distill.accumulation=5"],
        "batch_size must be a multiple of processes x accumulation = 1 x 5, got 16",
    ),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings_are_refused(case: str, refused: Any, points: list[str]) -> None:
    options, words = WRONG_SETTINGS[case]
    command = "distill" if any("distill." in option for option in options) else "train-teacher"
    teacher = ("--teacher", "own_teacher:make") if command == "distill" else ()
    assert words in refused(command, "--run", "run", *points, *teacher, *options)


@pytest.mark.parametrize(
    "setting", ["model.name=mlpp", "model.options.widht=3", "distill.method=mdf", "distill.rollout.solver=eulr"]
)
def test_names_are_checked_before_anything_is_done(setting: str, refused: Any, points: list[str]) -> None:
    assert "did you mean" in refused("demo", "--run", "run", *points, "--set", setting)
    assert not Path("run").exists()


def test_a_start_that_failed_is_not_in_the_way(cli: Any, refused: Any, points: list[str]) -> None:
    assert "root: dataset 'mixture-2d' has no files" in refused("demo", "--run", "run", *points, "--set", "data.root=x")
    assert Path("run/settings.toml").is_file()
    assert cli("train-teacher", "--run", "run", *points).code == 0


def test_distilling_needs_a_teacher(refused: Any, points: list[str]) -> None:
    assert "run has no teacher yet" in refused("distill", "--run", "run", *points)
    assert not Path("run").exists()


def test_what_is_finished_is_not_repeated(cli: Any, run: Path, points: list[str]) -> None:
    before = (run / "student.safetensors").read_bytes()
    for command, role in (("train-teacher", "teacher"), ("distill", "student")):
        result = cli(command, "--run", run, *points)
        assert (result.code, result.out) == (0, f"{run} already has its {role}; --fresh starts anew\n")
    assert (run / "student.safetensors").read_bytes() == before


def test_fresh_starts_anew(cli: Any, run: Path, points: list[str]) -> None:
    (run / "old").touch()
    result = cli("train-teacher", "--run", run, *points, "--fresh", "--seed", "3")
    assert result.code == 0
    assert not (run / "old").exists()
    assert not (run / "student.json").exists()
    assert RunFolder(run).read_settings().run.seed == 3
    assert not [path for path in run.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("flag", ["--fresh", "--resume"])
def test_a_folder_that_is_no_run_is_left_alone(flag: str, refused: Any, tmp_path: Path, points: list[str]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    message = refused("train-teacher", "--run", "thesis", flag, *points)
    assert "thesis holds files but is no run folder" in message
    assert (tmp_path / "thesis" / "chapter").read_text() == "years of work"


def test_a_file_is_no_folder(refused: Any, tmp_path: Path, points: list[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert "Not a directory: 'file'" in refused("train-teacher", "--run", "file", *points)


def test_a_folder_is_deleted_by_several_processes_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for index in range(40):
        (folder / str(index)).mkdir(parents=True)
    errors: list[BaseException] = []

    def delete() -> None:
        try:
            delete_folder(folder)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=delete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(tmp_path.glob("*run*")) == []


def stop_at(monkeypatch: pytest.MonkeyPatch, training: Any, update: int) -> None:
    import signal

    original, sent = training.run_update, []

    def run_update(self: Any, index: int) -> Any:
        if index == update and not sent:
            sent.append(index)
            signal.raise_signal(signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(training, "run_update", run_update)


def test_an_interrupted_teacher_goes_on_with_resume(
    cli: Any, refused: Any, points: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("train-teacher", "--run", "run", *points)
    stop_at(monkeypatch, TeacherTraining, 2)
    result = cli(*command, "--fresh")
    assert result.code == 75
    assert "teacher stopped after 3 of 6 updates; it is saved in run/checkpoints/teacher" in result.err
    assert "The same command with --resume auto in place of --fresh goes on from there." in result.err
    assert "run holds an unfinished teacher: pass --resume to go on or --fresh to start anew" in refused(*command)
    result = cli(*command, "--resume")
    assert result.code == 0
    assert "teacher: resumed after 3 updates" in result.out


def test_an_interrupted_student_goes_on_with_resume(
    cli: Any, refused: Any, run: Path, points: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RunFolder(run).read_tensors("student")
    for name in ("student.json", "student.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints" / "distill")
    command = ("distill", "--run", run, *points)
    stop_at(monkeypatch, DistillTraining, 4)
    result = cli(*command)
    assert result.code == 75
    assert "distillation stopped after 5 of 9 updates" in result.err
    assert "The same command with --resume auto goes on from there." in result.err
    assert "run holds an unfinished student: pass --resume to go on or --fresh to start anew" in refused(*command)
    assert "distill.batch_size was 16, is 8" in refused(*command, "--resume", "--set", "distill.batch_size=8")
    # How a run is watched may change, what it computes may not.
    watched = ("--set", "distill.log_every=7", "--set", "distill.keep_checkpoints=5")
    result = cli(*command, "--resume", *watched)
    assert result.code == 0
    assert "distillation: resumed after 5 updates" in result.out
    assert all(torch.equal(value, whole[name]) for name, value in RunFolder(run).read_tensors("student").items())


def test_resume_without_anything_to_resume(cli: Any, refused: Any, points: list[str]) -> None:
    assert "nothing to resume in" in refused("train-teacher", "--run", "run", *points, "--resume")
    result = cli("train-teacher", "--run", "run", *points, "--resume", "auto")
    assert result.code == 0
    assert "nothing to resume in run/checkpoints/teacher, starting anew" in result.out


def test_a_teacher_can_be_distilled_with_other_settings(cli: Any, run: Path, points: list[str]) -> None:
    for name in ("student.json", "student.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints" / "distill")
    assert cli("distill", "--run", run, *points, "--set", "distill.student_steps=2").code == 0
    assert load_student(run).steps == 2


def test_the_teacher_of_another_run(cli: Any, refused: Any, run: Path, points: list[str]) -> None:
    result = cli("distill", "--run", "second", "--teacher-run", run, *points)
    assert result.code == 0
    student, first = RunFolder(Path("second")), RunFolder(run)
    assert student.read_description("teacher") == first.read_description("teacher")
    assert all(torch.equal(v, first.read_tensors("student")[k]) for k, v in student.read_tensors("student").items())
    message = refused("distill", "--run", "x", "--teacher-run", run, "--teacher", "own_teacher:make", *points)
    assert "--teacher and --teacher-run: give one of them" in message
    assert "nowhere has no teacher yet" in refused("distill", "--run", "x", "--teacher-run", "nowhere", *points)


@pytest.mark.parametrize("roles", ["full", "lora"])
def test_a_teacher_of_the_users_own(roles: str, cli: Any, weights: Path, points: list[str]) -> None:
    place = "my run"
    result = cli(
        *("distill", "--run", place, "--teacher", "own_teacher:make", "--weights", weights, *points),
        *("--set", f"distill.roles={roles}", "--set", "distill.lora_rank=2"),
    )
    assert result.code == 0
    for tool, words in (("try", "sample"), ("measure it", "evaluate")):  # what it tells to type works as it is
        (told,) = re.findall(rf"{tool}: mfd-fast ({words} .*)", result.out)
        assert cli(*shlex.split(told)).code == 0
    run = RunFolder(Path(place))
    assert run.read_description("teacher") == {"factory": "own_teacher:make"}
    assert run.read_teacher(trust_code=True)(torch.ones(1, 2), torch.ones(1)).abs().sum() > 0
    assert load_student(place, trust_code=True).sample(4).shape == (4, 2)
    assert cli("info", place).code == 0


def test_a_run_of_the_users_own_factory_is_resumed(cli: Any, refused: Any, weights: Path, points: list[str]) -> None:
    """With the same command as it began, or by the factory of its folder."""
    teacher = ("--teacher", "own_teacher:make", "--weights", weights)
    for again in (teacher, ("--trust-code",)):
        shutil.rmtree("run", ignore_errors=True)
        stopped = cli("distill", "--run", "run", *points, *teacher, "--time-limit", "0.000001")
        assert stopped.code == 75
        assert "own_teacher:make" in refused("distill", "--run", "run", *points, "--resume")
        assert cli("distill", "--run", "run", *points, *again, "--resume").code == 0
        assert RunFolder(Path("run")).read_description("student")["network"] == {"factory": "own_teacher:make"}


WRONG_TEACHERS = {
    "weights alone": (["--weights", "weights.safetensors"], "--weights belongs to --teacher"),
    "no weights": (["--teacher", "own_teacher:make", "--weights", "none"], "none does not exist"),
    "no module": (["--teacher", "nowhere:make"], "'nowhere:make': there is no module 'nowhere'"),
    "no function": (["--teacher", "own_teacher:mak"], "module 'own_teacher' has no 'mak'"),
    "no network": (["--teacher", "own_teacher:three"], "must return an nn.Module, got int"),
    "weights of another": (["--teacher", "torch.nn:Identity", "--weights", "weights.safetensors"], "does not fit"),
    "shape of other data": (
        ["--teacher", "own_teacher:make", "--set", "data.name=digits", "--set", "data.options={}"],
        "x must have shape [B, 2], got [",
    ),
}


@pytest.mark.parametrize("case", WRONG_TEACHERS)
def test_wrong_teachers_are_refused(case: str, refused: Any, weights: Path, points: list[str]) -> None:
    options, words = WRONG_TEACHERS[case]
    assert words in refused("distill", "--run", "run", *points, *options)


def test_training_that_fails_is_exit_code_1(cli: Any, points: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("--set", "teacher.optimizer.learning_rate=1e30", "--set", "teacher.optimizer.clip_norm=none")
    result = cli(
        *("train-teacher", "--run", "run", *points, *more),
        *("--set", "distill.max_skipped_updates=1", "--set", "teacher.updates=50"),
    )
    assert result.code == 1
    assert result.err.startswith("mfd-fast train-teacher failed: 2 updates in a row had non-finite gradients")
    assert len(result.err.splitlines()) == 1
