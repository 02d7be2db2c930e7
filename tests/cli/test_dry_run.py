"""``distill --dry-run``: what it prints, and that it leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest

from mfd_fast.training.interrupts import Interrupted


def test_the_plan_of_cifar10(cli: Any) -> None:
    result = cli(
        "distill", "--preset", "cifar10", "--dry-run", "--set", "distill.rollout.step_size=0.5",
        "--set", "model.options.width=32", "--set", "model.options.blocks_per_level=1",
    )  # fmt: skip
    assert result.code == 0, result.err
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
    assert "10,000 of the student, 100,000 of the auxiliary (10 before every 1)" in lines["updates"]
    assert lines["distill.rollout.step_size"].endswith("given")
    assert lines["distill.cycle_auxiliary"].endswith("MFD's paper, of its other settings")
    assert lines["distill.student_optimizer.learning_rate"].endswith("chosen here")
    assert "samples are finite" in lines["rehearsed"]
    assert "the data are not there, samples of [3, 32, 32] were taken" in result.out
    assert "all 10,000 student updates: " in result.out
    assert list(Path().iterdir()) == []


def test_ctrl_c_promises_no_resume(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(settings: Any) -> Any:
        raise Interrupted(2, "distillation stopped; it is saved somewhere")

    monkeypatch.setattr("mfd_fast.cli.dry_run.rehearse", stopped)
    result = cli("distill", "--preset", "mixture-2d", "--dry-run")
    assert (result.code, result.err) == (130, "\nmfd-fast: stopped\n")


def test_wrong_settings_are_a_line(cli: Any) -> None:
    result = cli("distill", "--preset", "mixture-2d", "--dry-run", "--set", "distill.guidance_scale=2")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "no negative condition" in result.err
    result = cli("distill", "--preset", "demo", "--dry-run", "--teacher", "package:make")
    assert (result.code, result.err) == (
        2,
        "mfd-fast distill: --dry-run rehearses with a stand-in of model.name: leave --teacher out\n",
    )
