"""Whole runs without a network, and what a stranger wrote into a run folder."""

import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mfd_fast.run_folder import RunFolder

MARKUP = '<script>alert(1)</script><img src=x onerror="alert(2)">\'"&'


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **_: Any) -> Any:
        pytest.fail(f"the network was asked for: {arguments}")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.mark.usefixtures("_no_network")
def test_a_run_needs_no_network(cli: Any, points: list[str]) -> None:
    with pytest.raises(pytest.fail.Exception):
        socket.create_connection(("localhost", 1))
    for command in (
        ("train-teacher", "--run", "run", *points),
        ("distill", "--run", "run", *points),
        ("sample", "run", "--num", "4", "--out", "x.npz"),
        ("evaluate", "run"),
        ("checkpoint", "verify", "run"),
    ):
        result = cli(*command)
        assert result.code == 0, (command, result)


def test_markup_in_a_run_folder_is_shown_and_not_obeyed(cli: Any, run: Path) -> None:
    strange = run.with_name("run<b>bold")
    run.rename(strange)
    metrics = {
        "teacher": {"1": 2.0},
        "student": {"1": 1.0},
        "distance": MARKUP,
        "seconds": {MARKUP: 1.0, "$\\frac{$ ^ _": 2.0},
        "cpu_seconds": {"$x_{": 1.0},
        MARKUP: {"student": 1.0},
    }
    (strange / "metrics.json").write_text(json.dumps(metrics))
    (strange / "versions.json").write_text(json.dumps({MARKUP: MARKUP}))
    (strange / "student.json").write_text(json.dumps({"network": {"factory": MARKUP}, "steps": MARKUP}))
    settings = (strange / "settings.toml").read_text()
    (strange / "settings.toml").write_text(settings + f"# {MARKUP}\n")
    result = cli("report", strange)
    assert result.code == 0, result.err
    page = (strange / "report.html").read_text()
    assert "<script" not in page
    assert "onerror=&#34;" in page
    assert "<img src=x" not in page
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold" in page


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "a/../../outside", "..", "", "a\x00b", ".hidden", "9" * 256]
)
def test_names_in_a_manifest_stay_in_their_folder(name: str, cli: Any, run: Path) -> None:
    (checkpoint,) = (run / "checkpoints" / "distill").iterdir()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["state.json"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    result = cli("checkpoint", "verify", run)
    assert result.code == 1
    assert "a file must be a plain name, got " in result.out


def test_a_link_that_leads_out_of_a_checkpoint_is_not_followed(cli: Any, run: Path) -> None:
    (checkpoint,) = (run / "checkpoints" / "distill").iterdir()
    (checkpoint / "state.json").rename(run / "elsewhere.json")
    os.symlink(run / "elsewhere.json", checkpoint / "state.json")
    assert cli("checkpoint", "verify", run).code == 1


READERS = {
    "sample": ("sample", "run", "--num", "4", "--out", "x.npz"),
    "evaluate": ("evaluate", "run"),
    "recommend": ("recommend", "run", "--rows", "4", "--max-error", "1"),
    "distill": ("distill", "--run", "run", "--resume", "auto"),
    "distill from it": ("distill", "--run", "other", "--teacher-run", "run"),
}
STRANGER = """
import pathlib, torch
pathlib.Path("ran").touch()
class Make(torch.nn.Module):
    num_classes = None
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(2, 2)
    def forward(self, x, t, **_):
        return self.a(x)
"""


@pytest.fixture
def strangers(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose folder names a module beside it, which leaves a mark when it is imported."""
    from mfd_fast.storage import write_tensors

    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    Path("stranger.py").write_text(STRANGER)
    for role in ("teacher", "student"):
        description = json.loads((run / f"{role}.json").read_text())
        named = (
            {"factory": "stranger:Make"}
            if role == "teacher"
            else {**description, "network": {"factory": "stranger:Make"}}
        )
        (run / f"{role}.json").write_text(json.dumps(named))
        write_tensors(run / f"{role}.safetensors", {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2)})
    return run


@pytest.mark.parametrize("command", READERS)
def test_code_that_a_run_folder_names_runs_only_where_it_is_trusted(
    command: str, cli: Any, refused: Any, strangers: Path, points: list[str]
) -> None:
    assert strangers.samefile("run")
    arguments = [*READERS[command], *(points if command.startswith("distill") else ())]
    if command == "distill":
        shutil.rmtree(strangers / "checkpoints" / "distill")
        (strangers / "student.json").unlink()
    message = refused(*arguments)
    assert "is made by 'stranger:Make'" in message
    assert "pass --trust-code" in message
    assert not Path("ran").exists()
    assert cli(*arguments, "--trust-code").code == 0
    assert Path("ran").exists()


def test_other_commands_never_import_what_a_run_folder_names(cli: Any, strangers: Path) -> None:
    for command in (
        *(("report", strangers), ("info", strangers), ("export", strangers, "lora.safetensors")),
        *(("checkpoint", action, strangers) for action in ("list", "inspect", "verify", "prune")),
    ):
        assert cli(*command).code in (0, 2), command
    assert "run --num 64 --seed 0 --out samples.npz --trust-code" in (strangers / "report.html").read_text()
    assert not Path("ran").exists()


DAMAGED = {
    "a list": [],
    "little": {"network": {"model": "mlp"}, "steps": 1},
    "no network": {"network": 3},
    "another type": {"precision": []},
    "lora of nothing": {"roles": "lora", "lora": None},
    "text for steps": {"steps": "many"},
    "text for a shape": {"sample_shape": 7},
    "text for a range": {"value_range": {}},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_description_of_a_student_is_an_error_in_words(damage: str, refused: Any, run: Path) -> None:
    kept, spoilt = json.loads((run / "student.json").read_text()), DAMAGED[damage]
    whole = spoilt if damage in ("a list", "little") else kept | spoilt
    (run / "student.json").write_text(json.dumps(whole))
    refused("sample", run, "--num", "2", "--out", "x.npz")


def test_files_that_the_manifest_does_not_list_are_not_read(run: Path) -> None:
    from mfd_fast.training.checkpoint import load_checkpoint

    (checkpoint,) = (run / "checkpoints" / "distill").iterdir()
    (checkpoint / "unlisted.safetensors").write_bytes(b"anything")
    assert "unlisted" not in load_checkpoint(checkpoint).tensors


def test_checkpoint_commands(cli: Any, refused: Any, run: Path) -> None:
    (whole,) = (run / "checkpoints" / "distill").iterdir()
    listed = cli("checkpoint", "list", run)
    assert listed.code == 0
    assert f"distill/{whole.name}" in listed.out
    inspected = cli("checkpoint", "inspect", run)
    assert inspected.out.startswith(f"distill/{whole.name}\n")
    assert "  optimizer_student: " in inspected.out
    assert '"done": 9' in inspected.out
    assert "--name must be one of teacher/update-" in refused("checkpoint", "inspect", run, "--name", "nothing")
    assert cli("checkpoint", "verify", run).code == 0
    damaged = whole.with_name("update-000012")
    damaged.mkdir()
    result = cli("checkpoint", "verify", run)
    assert result.code == 1
    assert "update-000012 has no manifest.json: it was never finished" in result.out
    assert "deleted update-000012" in cli("checkpoint", "prune", run).out
    assert list((run / "checkpoints" / "distill").iterdir()) == [whole]
    (whole / "manifest.json").write_text("{}")
    assert "distill: deleted nothing" in cli("checkpoint", "prune", run).out, "the last one stays, whole or not"
    assert "keep must be at least 1, got 0" in refused("checkpoint", "prune", run, "--keep", "0")
    assert "is not a run folder" in refused("checkpoint", "list", run / "checkpoints")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90.0), ("2:30", 150.0), ("01:00:05", 3605.0)])
def test_a_time_limit_as_schedulers_write_it(text: str, seconds: float, cli: Any, points: list[str]) -> None:
    assert cli("train-teacher", "--run", "run", *points, "--time-limit", text).code == 0
    assert RunFolder(Path("run")).read_settings().run.max_seconds == seconds


@pytest.mark.parametrize("text", ["0", "-5", "soon", "1:2:3:4", "nan", "1:-1"])
def test_a_time_limit_that_is_none(text: str, cli: Any, points: list[str]) -> None:
    result = cli("train-teacher", "--run", "run", *points, f"--time-limit={text}")
    assert result.code == 2
    assert "expected seconds or HH:MM:SS above 0" in result.err


def test_a_limit_that_has_passed_ends_with_the_code_for_schedulers(cli: Any, points: list[str]) -> None:
    arguments = ("train-teacher", "--run", "run", *points, "--resume", "auto")
    result = cli(*arguments, "--time-limit", "0.000001")
    assert result.code == 75
    assert "the time limit is reached" in result.err
    assert "The same command with --resume auto goes on from there." in result.err
    assert cli(*arguments).code == 0
