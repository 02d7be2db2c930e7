"""A teacher of 8 bits, and the gate that lets it into rollouts."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast.config import DistillSettings
from mfd_fast.distillation import make_student
from mfd_fast.mean_velocity import mean_velocity_pair
from mfd_fast.models.sana import SanaNetwork
from mfd_fast.ops import quantized_linear
from mfd_fast.settings_io import load_settings
from mfd_fast.student import Student
from mfd_fast.task import Task
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.context import Context
from mfd_fast.training.distill import DistillTraining, method_options
from mfd_fast.training.distributed import World
from mfd_fast.training.making_roles import make_roles
from mfd_fast.training.teacher_weights import (
    ROWS,
    GateInputs,
    Measured,
    _points,
    finer_rollout,
    low_precision_teacher,
    measure,
    relative_errors,
)

SETTINGS = (
    *("distill.precision=float32", "distill.lora_rank=4", "distill.cycle_auxiliary=1", "distill.batch_size=4"),
    *("distill.rollout.step_size=0.1", "distill.student_updates=4", "distill.checkpoint_every=2"),
    *("distill.compile=off", "distill.student_optimizer.name=adamw", "distill.auxiliary_optimizer.name=adamw"),
)
CONTEXT = Context(torch.device("cpu"), World())
TWO_BITS = quantized_linear.Format(torch.int8, 1.0)
"""Numbers -1, 0 and 1."""


@pytest.fixture
def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    rows = {"prompt_embeds": torch.randn(10, 8, 16, generator=generator)}
    return Task((4, 4, 4), rows, {"prompt_embeds": torch.randn(1, 8, 16, generator=generator)})


@pytest.fixture
def teacher(make_sana: Callable[..., Any]) -> SanaNetwork:
    return SanaNetwork(make_sana(sample_size=4))


def settings_of(kind: str, *more: str) -> DistillSettings:
    return load_settings("sana-1600m", overrides=[*SETTINGS, f"distill.teacher_weights={kind}", *more]).distill


def training_of(teacher: SanaNetwork, task: Task, settings: DistillSettings, folder: Path) -> DistillTraining:
    roles = make_roles(teacher, settings, seed=0)
    student = make_student(roles, task, settings, CONTEXT.device)
    conditions = ConditionTable(task.conditions, task.negative_condition, 0)
    low = low_precision_teacher(teacher, settings, folder)
    return DistillTraining(roles, student, conditions, settings, 0, CONTEXT, low=low)


def test_errors_in_numbers() -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.0, 5.0]])  # rows of norm 5
    constant, changing = torch.tensor([[0.3, 0.4], [0.3, 0.4]]), torch.tensor([[0.3, 0.4], [-0.3, -0.4]])
    assert relative_errors(constant, gradient) == pytest.approx((0.1, 0.1))
    assert relative_errors(changing, gradient) == pytest.approx((0.1, 0.0))
    assert Measured(0.1, 0.1, 0.1, 0.1).passes
    assert not Measured(0.11, 0.1, 0.1, 0.1).passes
    assert not Measured(0.1, 0.11, 0.1, 0.1).passes
    assert not Measured(0.1, 0.1, math.inf, math.inf).passes
    assert not Measured(math.nan, 0.1, 0.1, 0.1).passes


def test_a_quarter_of_the_step_and_a_tenth_of_tolerances() -> None:
    def finer(**rollout: Any) -> dict[str, Any]:
        return finer_rollout(method_options(replace(plain, rollout=replace(plain.rollout, **rollout))).rollout)

    plain = settings_of("float")
    assert (finer()["step_size"], finer()["auxiliary_step_size"]) == (0.025, None)
    assert finer(step_size=None)["step_size"] == 0.005
    options = finer(step_size=None, steps=3, auxiliary_step_size=0.5, solver="rk4")
    assert (options["steps"], options["auxiliary_step_size"]) == (12, 0.125)
    options = finer(solver="bosh3", step_size=None, rtol=0.1)
    assert (options["rtol"], options["atol"]) == (pytest.approx(0.01), pytest.approx(0.001))


def exponential(rate: float) -> Callable[..., Tensor]:
    return lambda x, t: rate * x


@pytest.mark.parametrize(("solver", "share"), [("euler", 0.75), ("heun", 15 / 16)])
def test_errors_against_closed_forms(solver: str, share: float) -> None:
    """v = a x has u = x (exp(a (r - t)) - 1) / (r - t); of the solver's error the gate sees its share."""
    chosen = (f"distill.rollout.solver={solver}", "distill.guidance_scale=1", "distill.rollout.step_size=0.1")
    options = method_options(settings_of("float", *chosen))
    student = Student(exponential(0.3), (5,), 1)
    inputs = GateInputs(student, ConditionTable({}, None, 0), options, 4, 0)
    found = measure(exponential(1.0), exponential(1.01), exponential(-0.5), inputs, CONTEXT)

    def exact(rate: float, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return x.double() * ((torch.exp(rate * (r - t).double()) - 1) / (r - t).double())[:, None]

    points = [(x_t, t, r) for x_t, t, r, _ in _points(inputs, CONTEXT)]
    x_t, t, r = (torch.cat(parts) for parts in zip(*points, strict=True))
    assert len(x_t) == ROWS
    gradient = exact(1.0, x_t, t, r) - exact(-0.5, x_t, t, r)
    computed = mean_velocity_pair(exponential(1.0), exponential(-0.5), x_t, t, r, **options.rollout)
    solver_error, solver_bias = relative_errors(computed[0] - computed[1] - gradient, gradient)
    assert found.solver_error == pytest.approx(share * solver_error, rel=0.1)
    assert found.solver_bias == pytest.approx(share * solver_bias, rel=0.1)
    error, bias = relative_errors(exact(1.01, x_t, t, r) - exact(1.0, x_t, t, r), gradient)
    assert (found.error, found.bias) == (pytest.approx(error, rel=0.1), pytest.approx(bias, rel=0.1))
    assert 0 < bias < error


def test_int8_is_let_in_and_used(teacher: SanaNetwork, task: Task, tmp_path: Path) -> None:
    results = {}
    for kind in ("float", "int8"):
        training = training_of(teacher, task, settings_of(kind), tmp_path / kind)
        (tmp_path / kind).mkdir()
        losses = [float(training.run_update(update).loss) for update in range(training.total_updates)]
        results[kind] = losses
    noted = json.loads((tmp_path / "int8" / "teacher_weights.json").read_text())
    assert [entry["student_updates"] for entry in noted] == [0, 2]  # before the first, and with the checkpoint
    assert all(entry["error"] < entry["solver_error"] and entry["bias"] < entry["solver_bias"] for entry in noted)
    assert all(0 < entry["error"] < 0.1 for entry in noted)
    assert not (tmp_path / "float" / "teacher_weights.json").exists()
    assert results["float"][0] == results["int8"][0]  # the auxiliary's update has no teacher
    assert results["float"][1] != results["int8"][1]
    assert results["float"] == pytest.approx(results["int8"], rel=0.1)


def test_when_it_is_measured(teacher: SanaNetwork, tmp_path: Path) -> None:
    def due(every: int, begin: int) -> list[int]:
        low = low_precision_teacher(teacher, settings_of("int8", f"distill.checkpoint_every={every}"), tmp_path)
        assert low is not None
        found = []
        for student_updates in (done for done in range(begin, 25) for _ in range(2)):  # once for several updates
            if low.due(student_updates):
                found.append(student_updates)
                low._measured_at = student_updates
        return found

    assert due(3, 0) == [0, 3, 6, 12, 24]
    assert due(3, 7) == [7, 12, 24]  # a resume
    assert due(0, 0) == [0]


def test_a_spoilt_rounding_is_refused(
    teacher: SanaNetwork, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quantized_linear.FORMATS, "int8", TWO_BITS)
    training = training_of(teacher, task, settings_of("int8"), tmp_path)
    words = (
        r"distill.teacher_weights 'int8' is refused after 0 student updates: 8 bits change the gradient by [0-9.]+ of "
        r"itself, [0-9.]+ in the mean .* the solver's error is 0\.\d+, 0\.\d+ .* --set distill.teacher_weights=float"
    )
    before = {name: value.clone() for name, value in training.tensors()["auxiliary"].items()}
    with pytest.raises(ValueError, match=words):
        training.run_update(0)
    assert all(torch.equal(before[name], value) for name, value in training.tensors()["auxiliary"].items())
    (noted,) = json.loads((tmp_path / "teacher_weights.json").read_text())
    assert noted["error"] > noted["solver_error"]


def test_a_gradient_of_zero_lets_nothing_in(teacher: SanaNetwork, task: Task, tmp_path: Path) -> None:
    """Without guidance new roles are the teacher: of the gradient only what 8 bits do would be left."""
    with pytest.raises(ValueError, match=r"8 bits change the gradient by inf of itself"):
        training_of(teacher, task, settings_of("int8", "distill.guidance_scale=1"), tmp_path).run_update(0)
    (noted,) = json.loads((tmp_path / "teacher_weights.json").read_text())
    assert noted["error"] is None


def test_a_solver_without_error_lets_nothing_in(teacher: SanaNetwork, task: Task, tmp_path: Path) -> None:
    """The gate is about this run's solver: a better one is not to be spoilt by 8 bits."""
    fine = settings_of("int8", "distill.rollout.step_size=0.1", "distill.rollout.solver=rk4")
    with pytest.raises(ValueError, match="is refused after 0 student updates"):
        training_of(teacher, task, fine, tmp_path).run_update(0)
