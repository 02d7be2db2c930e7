"""``info``, ``doctor``, ``evaluate``, ``report``."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mfd_fast.closed_forms import Gaussian
from mfd_fast.methods import METHODS
from mfd_fast.presets import PRESETS
from mfd_fast.settings_io import describe_settings


@pytest.fixture(autouse=True)
def _fields(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "own_fields.py").write_text(
        "from mfd_fast.closed_forms import Gaussian\n"
        "from mfd_fast.fields import reversed_time\n"
        "from torch import nn\n"
        "def good():\n    return Gaussian([1.0, -0.5], [0.5, 1.5])\n"
        "def backwards():\n    return reversed_time(good())\n"
        "def nothing():\n    return 3\n"
        "class Labelled(nn.Module):\n"
        "    def forward(self, x, t, label):\n        return good()(x, t) + 0 * label[:, None]\n"
    )
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("own_fields", None)


def test_info_lists_what_can_be_chosen(cli: Any) -> None:
    result = cli("info")
    assert result.code == 0
    titles = {line.split()[0]: line for line in result.out.splitlines()}
    assert {"presets", "methods", "solvers", "models", "data", "versions"} <= titles.keys()
    assert all(preset in titles["presets"] for preset in PRESETS)
    assert "bosh3" in titles["solvers"]
    assert f"torch {torch.__version__.split('+')[0]}" in titles["versions"]


def test_info_settings_explains_every_setting(cli: Any) -> None:
    result = cli("info", "--settings")
    assert result.code == 0
    assert result.out.count("\n") == 2 * len(describe_settings())
    assert "distill.cycle_auxiliary = 10\n    auxiliary updates in a cycle (int, at least 0)\n" in result.out


def test_info_presets_shows_what_each_changes(cli: Any) -> None:
    result = cli("info", "--presets")
    assert [line.partition(":")[0] for line in result.out.splitlines()] == list(PRESETS)
    assert "teacher.updates=400000" in result.out


def test_info_methods_shows_options_and_what_comes_with_them(cli: Any) -> None:
    result = cli("info", "--methods")
    assert [line.partition(":")[0] for line in result.out.splitlines() if not line.startswith(" ")] == list(METHODS)
    assert "    comes with distill.student_gamma = 1.0\n" in result.out
    assert "    distill.method_options.weight = 'velocity': weight of v_T - v_A over t (one of 'kl', " in result.out
    short = cli("info").out.splitlines()
    assert [line.split()[1] for line in short if line.startswith("method  ")] == list(METHODS)


def test_info_of_a_run(cli: Any, finished: Path) -> None:
    result = cli("info", finished)
    assert result.code == 0
    assert "preset demo, mlp on digits, seed 0" in result.out
    assert "teacher  finished\nstudent  finished\n" in result.out
    assert "checkpoints of teacher: update-000006\n" in result.out
    assert "checkpoints of distill: update-000009\n" in result.out
    assert '"data_half_half"' in result.out


def test_info_of_an_unfinished_run(cli: Any, refused: Any, run: Path, tmp_path: Path) -> None:
    (run / "student.json").unlink()
    for path in sorted((run / "checkpoints" / "distill").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    result = cli("info", run)
    assert "student  not finished" in result.out
    assert "checkpoints of distill: none" in result.out
    assert "is not a run folder: it has no settings.toml" in refused("info", tmp_path)


def test_doctor_examines_this_machine(cli: Any) -> None:
    result = cli("doctor")
    assert result.code == 0
    assert "Python" in result.out
    assert "euler, 10 steps, float64" in result.out
    assert "FAILED" not in result.out
    parsed = json.loads(cli("doctor", "--json").out)
    assert {check["name"] for check in parsed} >= {"torch", "C++ core", "step control, C++"}


def test_doctor_says_when_something_is_wrong(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mfd_fast import doctor

    broken = doctor.SelfTest(lambda device: 1.0, 1e-12)
    monkeypatch.setattr(doctor, "SELF_TESTS", {"euler": broken})
    result = cli("doctor")
    assert result.code == 1
    assert "FAILED" in result.out


def test_doctor_on_a_device_that_does_not_exist(refused: Any) -> None:
    assert "--device must be auto, cpu, cuda or cuda:N, got 'tpu-ish'" in refused("doctor", "--device", "tpu-ish")


def test_doctor_checks_a_field(cli: Any) -> None:
    result = cli("doctor", "--field", "own_fields:good", "--data", "gaussian-2d")
    assert result.code == 0
    assert result.err == ""
    backwards = cli("doctor", "--field", "own_fields:backwards", "--data", "gaussian-2d")
    assert backwards.code == 1
    assert "reversed_time" in backwards.out
    report = json.loads(cli("doctor", "--field", "own_fields:backwards", "--data", "gaussian-2d", "--json").out)
    assert report["ok"] is False
    assert "reversed_time" in report["suggestion"]


def test_doctor_checks_a_field_on_data_of_the_users_own(cli: Any, refused: Any, tmp_path: Path) -> None:
    x = Gaussian([1.0, -0.5], [0.5, 1.5]).sample(2000, torch.Generator().manual_seed(0)).numpy()
    np.savez(tmp_path / "plain.npz", x=x)
    assert cli("doctor", "--field", "own_fields:good", "--data", "plain.npz").code == 0
    np.savez(tmp_path / "labelled.npz", x=x, condition=np.arange(2000) % 3)
    assert cli("doctor", "--field", "own_fields:Labelled", "--data", "labelled.npz").code == 0
    np.savez(tmp_path / "named.npz", x=x, label=np.arange(2000) % 3)
    assert cli("doctor", "--field", "own_fields:Labelled", "--data", "named.npz").code == 0
    np.savez(tmp_path / "wrong.npz", x=x, text=x)
    wrong = cli("doctor", "--field", "own_fields:Labelled", "--data", "wrong.npz")
    assert "call: field(x [64, 2] float32, t [64] float32, text [64, 2] float32) raised TypeError: " in wrong.out
    np.savez(tmp_path / "short.npz", x=x, label=np.arange(3))
    message = refused("doctor", "--field", "own_fields:good", "--data", "short.npz")
    assert "label in short.npz must be [2000, ...], a row for each of x, got int64 [3]" in message
    np.savez(tmp_path / "other.npz", y=x)
    message = refused("doctor", "--field", "own_fields:good", "--data", "other.npz")
    assert "other.npz must hold x [N, ...], it holds y" in message
    assert "there is no file none.npz" in refused("doctor", "--field", "own_fields:good", "--data", "none.npz")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--field", "own_fields.good"], "expected package.module:name, got 'own_fields.good'"),
        (["--field", "own_fields:god"], "module 'own_fields' has no 'god'"),
        (["--field", "own_fields:nothing"], "must return a callable field(x, t), got int"),
        (["--field", "own_fields:good", "--weights", "none"], "weights can only be loaded into an nn.Module"),
        (["--field", "own_fields:good", "--data", "gausian-2d"], "did you mean 'gaussian-2d'?"),
    ],
)
def test_doctor_refuses_wrong_fields(refused: Any, options: list[str], words: str) -> None:
    assert words in refused("doctor", "--data", "gaussian-2d", *options)


def test_evaluate_measures_again(cli: Any, run: Path) -> None:
    result = cli("evaluate", run)
    assert result.code == 0
    assert "student     1 step   sliced Wasserstein distance " in result.out
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["seconds"].keys() == {"sample", "evaluate", "report"}
    assert (run / "report.html").is_file()


def test_evaluate_needs_a_finished_student(refused: Any, run: Path, tmp_path: Path) -> None:
    (run / "student.json").unlink()
    assert "run has no student yet" in refused("evaluate", run)
    assert "there is no run folder" in refused("evaluate", tmp_path / "nowhere")


def test_report_of_a_run_that_is_not_finished(cli: Any, refused: Any, run: Path, tmp_path: Path) -> None:
    (run / "student.json").unlink()
    result = cli("report", run)
    assert (result.code, result.out) == (0, f"report in {run / 'report.html'}\n")
    assert (run / "report.html").read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert "is not a run folder" in refused("report", tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_recommend_tries_solvers_on_the_teacher(cli: Any, finished: Path) -> None:
    result = cli("recommend", finished, "--rows", "16")
    assert result.code == 0
    marked = [line for line in result.out.splitlines() if line.startswith("->")]
    assert len(marked) == 1
    assert f"to use it: --set distill.rollout.solver={marked[0].split()[1]} --set distill.rollout." in result.out


def test_recommend_within_limits(cli: Any, refused: Any, finished: Path) -> None:
    result = cli("recommend", finished, "--rows", "8", "--max-error", "1e-12")
    assert result.code == 1
    assert "nothing that was tried stays within the limit" in result.out
    result = cli("recommend", finished, "--rows", "8", "--max-evaluations", "4")
    (marked,) = [line for line in result.out.splitlines() if line.startswith("->")]
    assert float(marked.split()[-2]) <= 4
    assert "--rows must be at least 1, got 0" in refused("recommend", finished, "--rows", "0")


def test_what_was_measured_is_said_where_the_report_cannot_be_written(
    cli: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "report.html").unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = cli("evaluate", run)
    assert result.code == 2
    assert result.out.startswith("measuring samples of the teacher and of the student\n")
    assert "student     1 step " in result.out
    assert f"then: mfd-fast report {run}" in result.err
    assert (run / "metrics.json").is_file()
