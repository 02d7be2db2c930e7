import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfd_fast.presets import PRESETS
from mfd_fast.run_folder import RunFolder


def metrics_of(run: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def test_demo_leaves_metrics_with_the_promised_keys(finished: Path) -> None:
    metrics = metrics_of(finished)
    assert metrics["teacher"].keys() == {"1", "3"}
    assert metrics["student"].keys() == {"1"}
    assert metrics["held_out"].keys() == {"teacher", "student", "data"}
    assert 0 <= metrics["class_agreement"]["student"] <= 1
    assert 0 < metrics["data_half_half"] < 5
    assert metrics["distance"] == "Fréchet distance"
    phases = {"data", "teacher", "distill", "sample", "evaluate", "report"}
    assert metrics["seconds"].keys() == metrics["cpu_seconds"].keys() == phases
    assert all(seconds >= 0 for seconds in (metrics["seconds"] | metrics["cpu_seconds"]).values())


def test_the_presets_measure_the_teacher_at_1_10_and_100_steps() -> None:
    # Forecasts are measured as their paper does.
    assert all("evaluate.teacher_steps" not in preset for name, preset in PRESETS.items() if "occfm" not in name)


def test_demo_leaves_a_report_and_everything_a_user_may_want(finished: Path) -> None:
    report = (finished / "report.html").read_text(encoding="utf-8")
    assert report.lower().startswith("<!doctype html>")
    assert "data:image/" in report
    assert "report" in metrics_of(finished)["seconds"]
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {
        *("settings.toml", "versions.json", "teacher_log.jsonl", "log.jsonl", "metrics.json", "report.html"),
        *("teacher.safetensors", "teacher.json", "student.safetensors", "student.json"),
        *("samples/update-000000.png", "samples/update-000002.png"),
        *("evaluation/teacher-1.npz", "evaluation/teacher-3.npz", "evaluation/student-1.npz"),
    } <= names
    assert not any(Path(name).name.startswith(".") for name in names), "nothing temporary stays behind"
    with np.load(finished / "evaluation" / "student-1.npz", allow_pickle=False) as arrays:
        assert arrays["x"].shape == (60, 1, 8, 8)
        assert np.abs(arrays["x"]).max() <= 1


def test_demo_repeats_no_training_that_is_finished(cli: Any, run: Path, points: list[str]) -> None:
    weights = {role: (run / f"{role}.safetensors").read_bytes() for role in ("teacher", "student")}
    spent = {"teacher": 12.0, "distill": 34.0}
    (run / "metrics.json").write_text(json.dumps({"seconds": spent, "cpu_seconds": spent}))
    result = cli("demo", "--run", run, *points)
    assert result.code == 0
    assert "updates" not in result.out
    assert metrics_of(run)["seconds"].items() > spent.items()
    assert metrics_of(run)["cpu_seconds"].items() > spent.items()
    assert {role: (run / f"{role}.safetensors").read_bytes() for role in weights} == weights
    assert f"student     1 step   sliced Wasserstein distance {metrics_of(run)['student']['1']:.3f}\n" in result.out
    assert result.out.endswith(f"report: {run / 'report.html'}\n")


def test_demo_on_points(cli: Any, points: list[str]) -> None:
    result = cli("demo", "--seed", "7", *points)
    assert result.code == 0
    run = Path("runs/mixture-2d")
    metrics = metrics_of(run)
    assert metrics["seed"] == 7
    assert RunFolder(run).read_settings().run.seed == 7
    assert metrics["distance"] == "sliced Wasserstein distance"
    assert metrics["class_agreement"] == {"teacher": None, "student": None}
    assert "real data, half against half" in result.out


def test_a_stopped_demo_goes_on_by_itself(cli: Any, points: list[str]) -> None:
    for fresh, words in (((), ""), (("--fresh",), " without --fresh")):
        result = cli("demo", *points, *fresh, "--time-limit", "0.000001")
        assert result.code == 75
        assert result.err.endswith(f"\nThe same command{words} goes on from there.\n")
    result = cli("demo", *points)
    assert result.code == 0
    assert "teacher: resumed after 1 updates" in result.out


def test_another_seed_in_the_same_folder_is_refused(refused: Any, run: Path, points: list[str]) -> None:
    message = refused("demo", "--run", run, "--seed", "1", *points)
    assert "run.seed was 0, is 1" in message
    assert "pass --fresh to delete it and start anew, or --run to use another folder" in message


def test_a_runner_that_this_device_lacks_is_refused_before_the_teacher(
    refused: Any, points: list[str], tmp_path: Path
) -> None:
    message = refused("demo", *points, "--set", "distill.rollout.runner=captured")
    assert "distill.rollout.runner 'captured' is not possible here: CUDA graphs need a CUDA device" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", ["-1"])
def test_a_wrong_seed_is_refused(refused: Any, seed: str, tmp_path: Path) -> None:
    assert "run.seed must be int, at least 0; got -1" in refused("demo", "--seed", seed)
    assert list(tmp_path.iterdir()) == []
