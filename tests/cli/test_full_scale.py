"""The chain of docs/full_scale.md on CIFAR-10, with random pictures and a narrow network."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SMALL = (
    *("model.options.width=16", "model.options.blocks_per_level=1", "teacher.updates=2", "teacher.batch_size=4"),
    *("distill.student_updates=1", "distill.cycle_auxiliary=1", "distill.batch_size=4"),
    *("distill.rollout.step_size=0.5", "evaluate.num_samples=20", "evaluate.teacher_steps=[1, 3]"),
    *("data.root=data", "run.device=cpu", "run.tensorboard=false"),
)
DOCS = Path(__file__).parents[2] / "docs" / "full_scale.md"


def write_pictures(folder: Path) -> None:
    """The binary format with 20 random pictures in a file."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"):
        rows = random.integers(0, 256, (20, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(20) % 10
        rows.tofile(folder / f"{name}.bin")


@pytest.mark.slow
def test_the_documented_chain(cli: Any) -> None:
    write_pictures(Path("data/cifar-10-batches-bin"))
    commands = re.findall(
        r"^mfd-fast (\S+) +--preset cifar10 \$DATA --run runs/cifar10 ", DOCS.read_text("utf-8"), re.M
    )
    assert commands == ["train-teacher", "distill"]
    overrides = [text for setting in SMALL for text in ("--set", setting)]
    for command in commands:
        result = cli(command, "--preset", "cifar10", *overrides, "--run", "runs/cifar10")
        assert result.code == 0, result.err
    assert cli("evaluate", "runs/cifar10").code == 0
    metrics = json.loads(Path("runs/cifar10/metrics.json").read_text("utf-8"))
    assert set(metrics["teacher"]) == {"1", "3"}
    assert np.load("runs/cifar10/evaluation/student-1.npz")["x"].shape == (20, 3, 32, 32)
    _run_the_documented_script()
    assert len(list(Path("pictures/student-1").glob("*.png"))) == 20


def _run_the_documented_script() -> None:
    (script,) = re.findall(r"```python\n(.*?teacher-100.*?)```", DOCS.read_text("utf-8"), re.S)
    exec(compile(script.replace("teacher-100", "teacher-3"), "docs/full_scale.md", "exec"), {})
