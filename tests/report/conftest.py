"""Synthetic run folders."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfd_fast.report import save_image_grid

METRICS: dict[str, Any] = {
    "teacher": {"1": 375.2, "10": 8.41, "100": 2.1},
    "student": {"1": 1.93},
    "data_half_half": 0.85,
    "held_out": {"teacher": 3.4, "student": 3.3},
    "precision": {"teacher": 0.91, "student": 0.93},
    "recall": {"teacher": 0.88, "student": 0.84},
    "class_agreement": {"teacher": 0.985, "student": 0.991},
    "nearest_neighbour": {"student": 2.31, "held_out": 2.42},
    "seconds": {"teacher_training": 31.0, "distillation": 52.0},
    "cpu_seconds": {"teacher_training": 60.0, "distillation": 400.0},
    "seed": 0,
}


def _log_lines(cycles: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for cycle in range(cycles):
        update = 3 * cycle
        common = {"seconds": 0.1 * cycle, "grad_norm": float(1 + 0.1 * rng.random()), "learning_rate": 1e-3}
        loss = 0.4 + 0.01 * float(rng.standard_normal())
        lines += [{"update": update + i, "role": "auxiliary", "loss": loss, **common} for i in (1, 2)]
        gap = 0.5 * math.exp(-3 * cycle / cycles) + 0.05
        student = {"velocity_gap": gap, "velocity_gap_bins": [None, *(gap * (1 + i) for i in range(9))]}
        student |= {"sample_std": 0.58, "sample_mean": 0.0, "evaluations": 20.0, "skipped": 0}
        lines.append({"update": update + 3, "role": "student", "loss": gap * gap / 2, **common, **student})
    return lines


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that writes a complete run folder with 8x8 samples in ten classes."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / name
        (folder / "evaluation").mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(METRICS))
        (folder / "versions.json").write_text(json.dumps({"torch": "2.13.0"}))
        described = {"model": "mlp", "sample_shape": [1, 8, 8], "num_classes": 10, "options": {}}
        (folder / "teacher.json").write_text(json.dumps(described))
        student = {"network": described, "steps": 1, "sample_shape": [1, 8, 8], "value_range": [-1.0, 1.0]}
        (folder / "student.json").write_text(json.dumps(student))
        (folder / "settings.toml").write_text('name = "<script>alert(1)</script>"\nupdates = 300\n')
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _log_lines(40)))
        teacher = [{"update": i, "seconds": i, "loss": 1 / i + 0.4, "grad_norm": 1.0} for i in range(1, 60)]
        (folder / "teacher_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in teacher))
        rng = np.random.default_rng(0)
        x = rng.uniform(-1, 1, (60, 1, 8, 8)).astype(np.float32)
        for stem in ("teacher-100", "teacher-10", "teacher-1", "student-1"):
            np.savez(folder / "evaluation" / f"{stem}.npz", x=x, condition=np.arange(60) % 10)
        for update in range(0, 1000, 100):
            save_image_grid(folder / "samples" / f"update-{update:06d}.png", x[:16])
        return folder

    return make


@pytest.fixture(scope="session")
def full_run(make_run: Callable[[str], Path]) -> Path:
    """A complete run folder that tests only read."""
    return make_run("demo")


@pytest.fixture
def empty_run(tmp_path: Path) -> Path:
    """A run folder with nothing in it."""
    folder = tmp_path / "runs" / "empty"
    folder.mkdir(parents=True)
    return folder
