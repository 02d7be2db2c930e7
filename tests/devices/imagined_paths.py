"""Runs what users run on the imagined CUDA device: python THIS REPORT.jsonl [PATH...].

A program of its own: see imagined_cuda.py. Results are compared with those of the CPU. The report gets a line for each
path: its name and what went wrong.
"""

import copy
import importlib.util
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import imagined_cuda
import pytest
import torch
from imagined_cuda import CUDA, waits
from torch import Tensor, nn

import mfd_fast
from mfd_fast.data import load_dataset
from mfd_fast.data.dataset import Dataset
from mfd_fast.distillation import distill
from mfd_fast.doctor import self_test
from mfd_fast.dry_run import SMALL
from mfd_fast.fields import autocast
from mfd_fast.methods import METHODS
from mfd_fast.models import build_model
from mfd_fast.models.lora import LoRARoles
from mfd_fast.models.sana_stand_in import tiny_network
from mfd_fast.rollout import captured
from mfd_fast.rollout.compiled import NotCompilable
from mfd_fast.rows import map_tensors
from mfd_fast.run_folder import RunFolder
from mfd_fast.settings_io import load_settings
from mfd_fast.solvers import SOLVERS
from mfd_fast.training.distill import DistillTraining
from mfd_fast.training.teacher import train_teacher

T, R = torch.tensor([1.0, 0.4, 0.3, 0.9, 0.0]), torch.tensor([0.0, 0.3, 0.3, 0.6, 1.0])
LABEL, NULL = {"label": torch.tensor([0, 1, 2, 0, 1])}, {"label": torch.tensor([3])}
GUIDED = {"negative_condition": NULL, "guidance_scale": torch.linspace(0, 3, 5)}
TINY = (
    *("model.options.width=16", "model.options.depth=1", "teacher.updates=3", "teacher.batch_size=16"),
    *("distill.student_updates=2", "distill.cycle_auxiliary=2", "distill.batch_size=16", "run.tensorboard=false"),
    *("distill.rollout.step_size=0.25", "distill.log_every=1", "run.deterministic=false"),
)
TRAININGS: dict[str, tuple[str, ...]] = {
    **{name: (f"distill.method={name}",) for name in METHODS},
    "captured": ("distill.rollout.runner=captured", "distill.ema_decay=0.9", "distill.guidance_scale=3"),
    "captured-lora": ("distill.rollout.runner=captured", "distill.roles=lora", "distill.precision=bfloat16"),
    "float16": ("distill.method=dmd2", "distill.precision=float16", "distill.student_steps=2"),
    "adaptive": ("distill.rollout.solver=bosh3", "distill.accumulation=2"),
}
WAITING = {"adaptive", "captured", "captured-lora"}
"""Trainings whose updates wait for the device: the adaptive control does so in every step, recording once."""


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "two devices": lambda x: x + torch.ones(3),
    "an index of the CPU": lambda x: x.index_select(0, torch.zeros(1, dtype=torch.int64)),
    "a number of the CPU where none fits": lambda x: torch.stack([x[0], torch.tensor(1.0)]),
    "numpy": lambda x: x.numpy(),
    "pinned memory of the device": lambda x: x.pin_memory(),
    "a generator of the CPU": lambda x: x.normal_(generator=torch.Generator()),
    "a read in a capture": lambda x: in_a_capture(lambda: float(x[0])),
    "a copy in a capture": lambda x: in_a_capture(lambda: x.copy_(torch.zeros(3))),
    "a list in a capture": lambda x: in_a_capture(x.tolist),
}


def in_a_capture(work: Callable[[], object]) -> None:
    """Record some work."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        work()


def faults() -> None:
    """The imagined device minds what a real one minds."""
    for fault in FAULTS.values():
        with pytest.raises((RuntimeError, TypeError)):
            fault(torch.ones(3, device="cuda"))
    waits.clear()
    assert float(torch.ones(3, device="cuda").sum()) == 3
    assert list(waits) == ["_local_scalar_dense in elsewhere"]


def to(value: Any, device: torch.device) -> Any:
    """Conditions, tensors and modules on a device; anything else as it is."""
    if isinstance(value, dict):
        return map_tensors(value, lambda tensor: tensor.to(device))
    return value.to(device) if isinstance(value, Tensor | nn.Module) else value


@cache
def network() -> nn.Module:
    """A network on the CPU."""
    torch.manual_seed(0)
    return build_model("mlp", (6,), 3, width=16, depth=1)


def integrals(**options: Any) -> None:
    """Mean velocities and end states are those of the CPU, twice; with graphs also after the weights have changed."""
    x = torch.randn(5, 6)
    there = to(copy.deepcopy(network()), CUDA)
    for factor in (1.0, 1.0, 0.5):
        here = copy.deepcopy(network())
        for module in (here, there):
            for own, weight in zip(module.parameters(), network().parameters(), strict=True):
                own.data.copy_(factor * weight.data)
        for integrate in (mfd_fast.mean_velocity, mfd_fast.integrate):
            expected = integrate(here, x, T, R, condition=LABEL, **options | {"runner": "eager"})
            given = {name: to(value, CUDA) for name, value in options.items()}
            found = integrate(there, x.to(CUDA), T, R, condition=to(LABEL, CUDA), **given)
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


def pairs(runner: str) -> None:
    """Teacher and auxiliary on one backbone."""
    roles = LoRARoles(copy.deepcopy(network()), rank=2, alpha=2.0)
    x = torch.randn(5, 6)
    expected = mfd_fast.mean_velocity_pair(roles.teacher, roles.auxiliary, x, T, R, condition=LABEL)
    roles.network.to(CUDA)
    given = {"condition": to(LABEL, CUDA), "runner": runner, "return_stats": True}
    found = mfd_fast.mean_velocity_pair(roles.teacher, roles.auxiliary, x.to(CUDA), T, R, **given)
    torch.testing.assert_close(tuple(part.cpu() for part in found[:2]), expected, rtol=1e-4, atol=1e-5)
    assert found[2].teacher.runner == runner


def not_finite() -> None:
    """A call reports what an earlier one met."""
    field, x = (lambda x, t: x * float("nan")), torch.randn(5, 6, device=CUDA)
    mfd_fast.mean_velocity(field, x, T, R)
    with pytest.raises(FloatingPointError, match="an earlier rollout"):
        mfd_fast.mean_velocity(lambda x, t: x, x, T, R)
    assert bool(mfd_fast.mean_velocity(lambda x, t: x, x, T, R).isfinite().all())
    assert mfd_fast.mean_velocity(field, x, T, R, return_stats=True)[1].first_bad == (0, 1.0)


def waiting_is_not_recorded() -> None:
    """A field that reads from the device is refused before a capture has begun."""

    class Waiting(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * float(t[0])

    x = torch.randn(5, 6, device=CUDA)
    with pytest.raises(ValueError, match="recording it failed: called a synchronizing CUDA operation"):
        mfd_fast.mean_velocity(Waiting(), x, 1.0, 0.0, runner="captured")
    assert not imagined_cuda.Now.waiting_is_an_error


def models(name: str, shape: tuple[int, ...], condition: dict[str, Tensor], **options: Any) -> None:
    """Gradients and mean velocities of a network are those of the CPU; under autocast, whose lists differ, finite."""
    torch.manual_seed(0)
    classes = 3 if "label" in condition else None
    here: Any = tiny_network(None, 0) if name == "sana" else build_model(name, shape, classes, **SMALL[name] | options)
    for parameter in here.parameters():  # some begin as zeros, which would hide what comes before them
        nn.init.normal_(parameter, std=0.1)
    x, times, found = torch.randn(2, *shape), torch.tensor([0.3, 0.8]), list[Any]()
    for device in (torch.device("cpu"), CUDA):
        module = to(copy.deepcopy(here), device).requires_grad_(True)
        given = to(condition, device)
        u = mfd_fast.mean_velocity(module, to(x, device), 0.9, 0.2, steps=2, condition=given)
        weights = list(module.parameters())
        for dtype in (None, torch.bfloat16):
            loss = autocast(module, dtype)(to(x, device), to(times, device), **given).float().square().mean()
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            norms = torch.stack([gradient.norm() for gradient in gradients if gradient is not None])
            assert norms.isfinite().all()
            found.append((u.cpu(), norms.cpu()) if dtype is None else None)
    torch.testing.assert_close(found[2], found[0], rtol=1e-3, atol=1e-5)


def points() -> Dataset:
    """Sixty points in three classes."""
    whole = load_dataset("mixture-2d", num_samples=60, num_held_out=30)
    return Dataset("points", whole.x, torch.arange(60) % 3, whole.held_out_x, torch.arange(30) % 3, num_classes=3)


def training(name: str) -> None:
    """The student is that of a training on the CPU, can be loaded onto the device, and its updates wait for nothing."""
    original, waited = DistillTraining.run_update, []

    def run_update(self: DistillTraining, update: int) -> Any:
        waits.clear()
        result = original(self, update)
        waited.extend(waits)
        return result

    students = []
    with tempfile.TemporaryDirectory() as folder:
        for device in ("cuda", "cpu"):
            options = [*TINY, *TRAININGS[name], f"run.device={device}"]
            if device == "cpu":
                options.append("distill.rollout.runner=eager")
            torch.manual_seed(0)
            teacher = build_model("mlp", (2,), 3, width=16, depth=1)
            for parameter in teacher.parameters():
                nn.init.normal_(parameter, std=0.15)
            DistillTraining.run_update = run_update if device == "cuda" else original  # type: ignore[method-assign]
            distill(teacher, load_settings("mixture-2d", overrides=options), points(), Path(folder) / device)
            students.append(RunFolder(Path(folder) / device).read_tensors("student"))
        sample = mfd_fast.load_student(Path(folder) / "cuda", device="cuda").sample(4)
        torch.testing.assert_close(sample, mfd_fast.load_student(Path(folder) / "cuda").sample(4), rtol=2e-2, atol=2e-2)
    low = "bfloat16" in str(TRAININGS[name]) or "float16" in str(TRAININGS[name])
    torch.testing.assert_close(*students, rtol=0, atol=3e-3 if low else 2e-5)
    assert name in WAITING or not waited, waited


def teacher() -> None:
    """A teacher is trained."""
    settings = load_settings("mixture-2d", overrides=[*TINY, "run.device=cuda", "teacher.ema_decay=0.9"])
    with tempfile.TemporaryDirectory() as folder:
        train_teacher(settings, points(), RunFolder(Path(folder)), mfd_fast.training.context.make_context(settings.run))


def doctor() -> None:
    """The numeric self-test passes."""
    failed = [check for check in self_test(CUDA) if check.failed]
    assert not failed, failed


NUMBERS = torch.Generator().manual_seed(0)
VIDEO = {
    "history": torch.randn(2, 6, 4, 8, 8, generator=NUMBERS),
    "trajectory": torch.randn(2, 12, 2, generator=NUMBERS),
}
PROMPTS = {
    "prompt_embeds": torch.randn(2, 6, 16, generator=NUMBERS),
    "prompt_mask": torch.arange(6) < torch.tensor([[2], [5]]),
}
PATHS: dict[str, Callable[[], None]] = {
    "faults": faults,
    **{f"integral-{name}": partial(integrals, solver=name, step_size=0.1, **GUIDED) for name in SOLVERS},
    "integral-savings": partial(integrals, step_size=0.1, negative_every=2, guidance_interval=(0.2, 0.8), **GUIDED),
    "integral-limited": partial(integrals, solver="ab2", step_size=0.1, max_rows=4, **GUIDED),
    "integral-gradient": partial(integrals, solver="heun", steps=2, differentiable=True),
    "captured": partial(integrals, runner="captured", solver="ab2", step_size=0.2),
    "captured-guided": partial(integrals, runner="captured", solver="rk4", step_size=0.2, **GUIDED),
    "captured-limited": partial(integrals, runner="captured", solver="euler", step_size=0.2, max_rows=4, **GUIDED),
    **{f"pair-{runner}": partial(pairs, runner) for runner in ("eager", "captured")},
    "not-finite": not_finite,
    "waiting-is-not-recorded": waiting_is_not_recorded,
    "doctor": doctor,
    "dit": partial(models, "dit", (1, 8, 8), {"label": torch.tensor([0, 2])}, patch_size=2),
    "unet": partial(models, "unet", (3, 8, 8), {"label": torch.tensor([0, 2])}),
    "occfm": partial(models, "occfm", (6, 4, 8, 8), VIDEO),
    "teacher": teacher,
    **{f"training-{name}": partial(training, name) for name in TRAININGS},
}


def not_compiled(_: object) -> None:
    """Compiled code is for real devices."""
    raise NotCompilable("there is nothing to compile for")


def main() -> None:
    """Run all paths."""
    if importlib.util.find_spec("diffusers") is not None:
        tiny_network(None, 0)  # what is imported for it asks for a real device
        PATHS["sana"] = partial(models, "sana", (4, 8, 8), PROMPTS)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)  # torch about itself
    captured.compiled_field = not_compiled  # type: ignore[attr-defined]
    imagined_cuda.install()
    report, *chosen = sys.argv[1:]
    for name in chosen or PATHS:
        began = time.monotonic()
        try:
            with torch.random.fork_rng([]):
                torch.manual_seed(1)
                PATHS[name]()
            problem = None
        except Exception:
            problem = traceback.format_exc()
        with Path(report).open("a", encoding="utf-8") as file:
            seconds = round(time.monotonic() - began, 2)
            print(json.dumps({"path": name, "problem": problem, "seconds": seconds}), file=file)


if __name__ == "__main__":
    main()
