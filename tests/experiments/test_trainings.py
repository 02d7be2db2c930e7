"""The experiments that train networks, with budgets of a second or so."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mfd_fast.experiments.base import Work
from mfd_fast.experiments.distance import DISTANCE, phases
from mfd_fast.experiments.jacobian import compare
from mfd_fast.experiments.points import distilled, points_settings, snapshot
from mfd_fast.experiments.step_size import STEP_SIZE
from mfd_fast.experiments.table import TABLE, TableSettings, settings_of, updates_in_time
from mfd_fast.experiments.variance import VARIANCE
from mfd_fast.report.theme import LIGHT, drawing_style
from mfd_fast.settings_io import settings_diff
from mfd_fast.training.distill import method_from
from mfd_fast.training.teacher import train_teacher

TINY = (
    *("data.options.num_samples=200", "data.options.num_held_out=100", "teacher.updates=3"),
    *("model.options.width=16", "model.options.depth=1", "distill.batch_size=16", "distill.rollout.step_size=0.5"),
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_snapshot_is_the_end_of_the_training(tmp_path: Path) -> None:
    settings = points_settings(0, 3, 2, 0.5)
    run = distilled(settings, tmp_path / "run", tmp_path / "teacher")
    student, teacher, auxiliary = snapshot(run)
    x, t = torch.randn(4, 2), torch.full((4,), 0.5)
    assert not torch.equal(teacher(x, t), auxiliary(x, t))
    assert not torch.equal(student.field(x, t), teacher(x, t))
    assert distilled(settings, tmp_path / "run", tmp_path / "teacher") == run


def test_losses_of_frozen_networks(tmp_path: Path) -> None:
    settings = replace(VARIANCE.quick, teacher_updates=3, early_updates=1, student_updates=2, samples=64, step_size=0.5)
    found = VARIANCE.run(settings, "early", Work(0, tmp_path, {}))
    for method in ("mfd", "vsd"):
        quantiles = found[method]["loss_quantiles"]
        assert quantiles == sorted(quantiles)
        assert found[method]["gradient_variance"] > 0


def test_cosines_of_known_gradients() -> None:
    full = torch.tensor([[1.0, 0.0], [0.0, -2.0], [1.0, 1.0]])
    omitted = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    found = compare(full, omitted)
    assert found["cosine_mean"] == pytest.approx(0)
    assert found["share_against"] == pytest.approx(1 / 3)
    assert found["norm_full"] == pytest.approx((7 / 3) ** 0.5)


def test_phases_of_a_known_curve() -> None:
    curve = [0.1 * i for i in range(1, 11)] + [1.0] * 50 + [1.0 - 0.01 * i for i in range(40)]
    found = phases(curve)
    assert found["highest"] == pytest.approx(1.0)
    assert found["peak_at"] == pytest.approx(0.1, abs=0.02)
    assert found["plateau_until"] == pytest.approx(0.81, abs=0.03)


def test_distance_over_a_training(tmp_path: Path) -> None:
    found = DISTANCE.run(
        replace(DISTANCE.quick, teacher_updates=3, student_updates=4), "training", Work(0, tmp_path, {})
    )
    lines = [json.loads(line) for line in next((tmp_path / "training").glob("**/log.jsonl")).read_text().splitlines()]
    gaps = [line["velocity_gap"] for line in lines if line.get("role") == "student"]
    assert found["gap"] == pytest.approx(gaps, abs=1e-6)
    assert len(found["gap"]) == 4


def test_step_sizes_of_a_network(tmp_path: Path) -> None:
    settings = replace(STEP_SIZE.quick, rows=32, teacher_updates=3, step_sizes=(0.02, 0.25), student_updates=1)
    work = Work(0, tmp_path, {})
    results = {cell: [STEP_SIZE.run(settings, cell, work)] for cell in STEP_SIZE.cells(settings)}
    assert list(results) == ["gaussian", "network", "quality-0.02", "quality-0.25"]
    assert results["network"][0]["float32"][0] < results["network"][0]["float32"][1]
    assert "Student with step size 0.25" in STEP_SIZE.finding(results)
    with drawing_style(LIGHT):
        assert len(STEP_SIZE.figure(results, LIGHT).axes) == 3


@pytest.mark.parametrize(
    ("first", "own", "updates"),
    [
        ({"cpu_seconds": 10.0, "student_updates": 50}, {"cpu_seconds": 4.0, "student_updates": 50}, 125),
        ({"cpu_seconds": 10.0, "student_updates": 50}, {"cpu_seconds": 0.01, "student_updates": 50}, 1000),
        ({"error": "no"}, {"cpu_seconds": 4.0, "student_updates": 50}, None),
    ],
)
def test_updates_in_equal_time(first: dict[str, float], own: dict[str, float], updates: int | None) -> None:
    assert updates_in_time(first, own, 20.0) == updates


def test_table_of_two_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    monkeypatch.setattr(
        "mfd_fast.experiments.points.train_teacher", lambda *a, **k: (trained.append(1), train_teacher(*a, **k))[1]
    )
    settings = TableSettings("mixture-2d", 1, ("mfd", "cd"), 2.0, TINY, timed_seeds=1)
    done: dict[str, dict[str, object]] = {}
    for cell in TABLE.cells(settings):
        done[cell] = TABLE.run(settings, cell, Work(0, tmp_path, done))
    assert list(done) == ["teacher", "mfd", "cd", "cd-time"]
    assert trained == [1]
    assert done["mfd"]["student_updates"] == 1
    assert done["cd-time"]["student_updates"] == updates_in_time(done["mfd"], done["cd"], 2.0)
    assert TABLE.run(settings, "cd-time", Work(1, tmp_path, done)).keys() == {"left_out"}
    results = {cell: [found] for cell, found in done.items()}
    words = TABLE.finding(results)
    assert f"{done['cd']['distance']:.3g}" in words
    assert done["mfd"]["peak_bytes"] > done["cd"]["peak_bytes"] > 0  # an auxiliary with its optimiser
    assert words.count("peak memory") == 2
    assert f"peak memory {done['cd']['peak_bytes'] / 2**20:.3g} MiB" in words
    with drawing_style(LIGHT):
        TABLE.figure(results, LIGHT)


def test_settings_of_one_method_and_the_methods_with_equal_time() -> None:
    settings = TableSettings(
        texts=("distill.batch_size=64",), own={"vsd": ["distill.batch_size=32"]}, methods=("mfd", "vsd", "cd"), timed=()
    )
    assert {name: settings_of(settings, name, 7, 3).distill.batch_size for name in settings.methods} == {
        "mfd": 64,
        "vsd": 32,
        "cd": 64,
    }
    assert TABLE.cells(settings) == ("teacher", "mfd", "vsd", "cd")


def test_the_settings_of_the_digits_are_settings() -> None:
    for method, texts in TABLE.full.own.items():
        chosen = settings_of(TABLE.full, method, None, 0)
        assert settings_diff(chosen, settings_of(replace(TABLE.full, own={}), method, None, 0)), texts
        method_from(chosen.distill)


def test_a_method_that_gives_up_has_its_error_in_the_table() -> None:
    good = {"distance": 0.5, "precision": 1.0, "recall": 0.25, "class_agreement": None}
    best = {**good, "distance": 0.25}
    done = {"cpu_seconds": 1.0, "student_updates": 10}
    results = {
        "teacher": [{"steps": {str(steps): good for steps in (1, 2, 4, 10)} | {"100": best}}] * 2,
        "mfd": [{**good, **done}, {"error": "gradients stayed non-finite"}],
        "cd": [{"error": "gradients stayed non-finite"}] * 2,
        "cd-time": [{**best, **done}, {"left_out": "at equal time there is one seed"}],
    }
    lines = TABLE.finding(results).splitlines()
    assert lines[-3].split()[:4] == ["mfd", "0.5", "2", "x"]
    assert "(1 of 2 seeds failed: gradients stayed non-finite)" in lines[-3]
    assert lines[-2].split()[1:] == ["failed:", "gradients", "stayed", "non-finite"]
    assert lines[-1].split()[:5] == ["cd,", "equal", "time", "0.25", "1"]
    assert lines[-1].endswith("(1 of 2 seeds)")
