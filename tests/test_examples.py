"""The scripts that users copy from run, and do what they say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mfd_fast.solvers import SOLVERS

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_solver_has_order_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfd_fast.solvers.SOLVERS", SOLVERS.copy())
    errors = load("own_solver").main()
    assert errors["ralston"] < errors["euler"] / 50


def test_existing_loop_moves_the_student_to_the_data() -> None:
    with torch.random.fork_rng():
        before, after = load("existing_loop").main(student_updates=25, batch_size=64, start_updates=150)
    assert after < 0.7 * before


def test_own_teacher_is_distilled(tmp_path: Path) -> None:
    example = load("own_teacher")
    with torch.random.fork_rng():
        mean, std = example.main(tmp_path / "run", student_updates=40, teacher_updates=500)
    assert torch.allclose(mean, torch.tensor([2.0, 0.0]), atol=0.15)
    assert float((std - 0.3).abs().max()) < 0.15
    assert (tmp_path / "run" / "student.safetensors").is_file()


def test_sana_existing_loop_has_the_losses_of_the_loops_it_replaces() -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    example = load("sana_existing_loop")
    with torch.random.fork_rng():
        losses = [example.main(["--cycles", "2", "--batch-size", "3", *extra]) for extra in ([], ["--by-hand"])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == 2
