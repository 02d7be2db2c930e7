"""Compiled updates: the same gradients and the same course, and a rule for when they are worth it."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from mfd_fast.config import Settings
from mfd_fast.distillation import distill
from mfd_fast.fields import autocast
from mfd_fast.methods.mfd import flow_matching_loss
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.models.lora import LoRARoles
from mfd_fast.ops import linear
from mfd_fast.run_folder import RunFolder
from mfd_fast.student import Student
from mfd_fast.task import Task
from mfd_fast.training import step
from mfd_fast.training.distill import DistillTraining
from mfd_fast.training.interrupts import Interrupted
from mfd_fast.training.roles import FullRoles
from mfd_fast.training.step import Work, make_updates, trained_copy

Teacher = Callable[..., VelocityNetwork]
LARGE_EPS = tuple(f"distill.{role}_optimizer.eps=1e-3" for role in ("auxiliary", "student"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whole graphs, forward and backward, without generating code; oneDNN's product on any machine."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(real, fullgraph=True, backend="aot_eager"))
    monkeypatch.setattr(linear, "why_not_onednn", lambda: None)
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def gradients(field: Any, parameters: list[nn.Parameter]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 8, 2, generator=generator)
    t, label = torch.rand(8, generator=generator), {"label": torch.arange(8) % 3}
    return list(torch.autograd.grad(flow_matching_loss(field, data, noise, t, label), parameters))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_gradients_are_those_of_the_role(tiny_teacher: Teacher, kind: str, precision: torch.dtype | None) -> None:
    teacher = tiny_teacher(3).requires_grad_(False)
    roles: Any = FullRoles(teacher) if kind == "full" else LoRARoles(teacher, rank=2, alpha=2.0)
    parameters = roles.parameters("auxiliary")
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    field = autocast(roles.auxiliary, precision)
    compiled = trained_copy(field)
    for _ in range(2):
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if precision is None else {"rtol": 0.05, "atol": 1e-2}
        torch.testing.assert_close(gradients(compiled, parameters), gradients(field, parameters), **tolerance)
        torch.optim.AdamW(parameters, lr=0.1, fused=True).step()
        parameters[0].data.mul_(1.5)
    assert counters["stats"]["unique_graphs"] == 1
    assert all(parameter.grad is None for parameter in parameters)


def work(rows: int, updates: int) -> Work:
    return Work(updates, torch.zeros(rows, 4), {})


class Product(nn.Module):
    """One matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = self.product(x)
        return result


def test_work_is_counted() -> None:
    assert work(7, 10).operations(Product()) == 3 * (2 * 4 * 4) * 7 * 10


def made(setting: str, monkeypatch: pytest.MonkeyPatch, limit: float) -> tuple[bool, list[str]]:
    monkeypatch.setitem(step.WORTH_COMPILING, "cpu", limit)
    fields, said = (Product(), Product()), []
    parameters = {name: list(field.parameters()) for name, field in zip(("auxiliary", "student"), fields, strict=True)}
    student = Student(fields[1], (4,))
    updates = make_updates(setting, fields[0], student, parameters, work(7, 10), said.append)
    assert updates.compiled or (updates.auxiliary, updates.student) == fields
    assert all(parameter.grad is None for group in parameters.values() for parameter in group)
    return updates.compiled, said


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("setting", "limit", "expected"),
    [("on", 1e9, True), ("off", 1.0, False), ("auto", 6720.0, True), ("auto", 6721.0, False)],
)
def test_auto_compiles_what_is_large(
    setting: str, limit: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, said = made(setting, monkeypatch, limit)
    assert compiled is expected
    assert [words.split(" ")[0] for words in said] == (["compiling", "compiled"] if expected else [])


class Sum(nn.Module):
    """A product and what was prepared, or a part of the condition as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor, number: Tensor | None = None, ready: Tensor | None = None) -> Tensor:
        result: Tensor = self.product(x) + (number if ready is None else ready)
        return result


class Preparing:
    """A field on a network, as the roles of SANA are, that prepares its condition."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def __call__(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        result: Tensor = self.network(x, t, **condition)
        return result

    def with_network(self, network: Any) -> "Preparing":
        return Preparing(network)

    def prepare_conditions(self, groups: Any) -> list[dict[str, Tensor]]:
        return [{"ready": 2 * condition["number"]} for _, condition in groups]


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's compiler looks at it
def test_the_students_updates_are_tried_out_as_they_are() -> None:
    """From conditions that are prepared, and with steps after the first, which begin from what has a gradient."""
    network, x, condition = Sum(), torch.randn(3, 4), {"number": torch.ones(3, 4)}
    parameters = list(network.parameters())
    student = Student(Preparing(network), (4,), steps=3)
    updates = make_updates(
        "on",
        Preparing(network),
        student,
        {"auxiliary": parameters, "student": parameters},
        Work(1, x, condition),
        lambda words: None,
    )
    tried = counters["stats"]["unique_graphs"]
    assert tried == 3  # the auxiliary; a step from noise; a step from another
    eager, compiled = (
        torch.autograd.grad(of.generate(x, condition, with_gradient=True).square().mean(), parameters)
        for of in (student, replace(student, field=updates.student))
    )
    torch.testing.assert_close(compiled, eager)
    assert counters["stats"]["unique_graphs"] == tried


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise TorchDynamoException("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    compiled, said = made("auto", monkeypatch, 1.0)
    assert not compiled
    assert said[-1] == "updates run eager: torch.compile failed: no C++ compiler"
    with pytest.raises(ValueError, match=r"distill\.compile is on but not possible: torch\.compile failed: no C"):
        made("on", monkeypatch, 1.0)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_compiled_course_is_the_eager_one(
    kind: str,
    tmp_path: Path,
    tiny_settings: Callable[..., Settings],
    tiny_teacher: Teacher,
    labelled_task: Task,
    stop_after: Callable[..., None],
) -> None:
    """All of the cycle compiled, against none of it; and stopped in between, against left alone."""

    def run(name: str, *overrides: str, resume: bool = False) -> dict[str, Tensor]:
        settings = tiny_settings(
            *(f"distill.roles={kind}", "distill.lora_rank=2", "distill.guidance_scale=1.5"),
            *("distill.student_steps=2", "distill.grad_steps=1", "distill.student_updates=2"),
            *(*LARGE_EPS, *overrides),
        )
        distill(tiny_teacher(3), settings, labelled_task, tmp_path / name, resume=resume)
        return RunFolder(tmp_path / name).read_tensors("student")

    eager = run("eager", "distill.rollout.runner=eager")
    assert counters["stats"]["unique_graphs"] == 0
    compiled = run("compiled", "distill.compile=on", "distill.rollout.runner=compiled")
    # Auxiliary; student with and without gradient; its samples; rollouts of one row and of several.
    assert 1 <= counters["stats"]["unique_graphs"] <= 4 + (4 if kind == "full" else 2)
    assert not counters["graph_break"]
    assert max((compiled[name] - value).abs().max().item() for name, value in eager.items()) < 1e-5
    if kind == "full":  # nothing else happens on a shared backbone, and compiling three times takes its time
        return
    stop_after(DistillTraining, 4)
    with pytest.raises(Interrupted):
        run("parts", "distill.compile=on", "distill.rollout.runner=compiled")
    parts = run("parts", "distill.compile=on", "distill.rollout.runner=compiled", resume=True)
    assert all(torch.equal(value, compiled[name]) for name, value in parts.items())


@pytest.mark.usefixtures("quick")
def test_updates_that_are_compiled_only_after_a_stop_are_named(
    tmp_path: Path,
    tiny_settings: Callable[..., Settings],
    tiny_teacher: Teacher,
    labelled_task: Task,
    stop_after: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_after(DistillTraining, 2)
    with pytest.raises(Interrupted):
        distill(tiny_teacher(3), tiny_settings(), labelled_task, tmp_path)
    distill(tiny_teacher(3), tiny_settings("distill.compile=on"), labelled_task, tmp_path, resume=True)
    assert "no longer bit for bit as without a stop: compiled updates was False, is True" in capsys.readouterr().out
