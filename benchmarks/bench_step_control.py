"""Adaptive step control: one decision on a batch of rows, by the definition in torch, the C++ core and Triton kernels.

    make bench

Before anything is timed each variant is compared with the definition. The clock waits for a GPU to finish.
"""

import math
import os
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from mfd_fast import native
from mfd_fast.ops import launchers
from mfd_fast.ops import step_control as op
from mfd_fast.ops.step_control import ControlState, advance_reference
from mfd_fast.step_control import AdaptiveSteps

SHAPES = [(16, 2), (1024, 64), (64, 32768)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
VARIANTS: list[tuple[str, str]] = [("reference", device) for device in DEVICES] + [("core", "cpu"), ("triton", "cuda")]

Decide = Callable[..., ControlState]


def proposal(rows: int, width: int, device: str) -> tuple[AdaptiveSteps, ControlState, Tensor, Tensor, Tensor, Tensor]:
    """Control, state, ends, states, candidates and errors; about half of the steps are acceptable."""
    generator = torch.Generator().manual_seed(0)
    control = AdaptiveSteps()
    t = 0.5 + 0.5 * torch.rand(rows, generator=generator)
    x = torch.randn(rows, width, generator=generator)
    candidate = x + 0.05 * torch.randn(rows, width, generator=generator)
    size = 0.02 * 2 ** torch.linspace(-1, 1, rows)[:, None]
    tensors = [value.to(device) for value in (x, candidate, size * torch.randn(rows, width, generator=generator))]
    r = torch.zeros(rows, device=device)
    return control, control.start(t.to(device), r), r, *tensors


def find(variant: str, device: str) -> Decide:
    """The implementation, or skip where this machine has none."""
    if variant == "reference":
        return advance_reference
    if variant == "core" and native.core() is None:
        pytest.skip(f"no C++ core: {native.why_no_core()}")
    if variant == "triton":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        if launchers.load("step_control", torch.device(device, 0)) is None:
            pytest.skip(f"no Triton kernels: {launchers.why_off(torch.device(device, 0))}")
    return op.advance


@pytest.mark.parametrize(("variant", "device"), VARIANTS, ids=[f"{name}-{device}" for name, device in VARIANTS])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_step_control(benchmark: BenchmarkFixture, shape: tuple[int, int], variant: str, device: str) -> None:
    """float32, one thread on the CPU."""
    torch.set_num_threads(1)
    decide = find(variant, device)
    given = proposal(*shape, device)
    benchmark.group = f"step control, {shape[0]} rows of {shape[1]}"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPUs, 1 thread"
    benchmark.extra_info.update(torch=torch.__version__, device=name, shape=list(shape), dtype="float32")

    def run() -> ControlState:
        after = decide(*given, 3)
        if device == "cuda":
            torch.cuda.synchronize()
        return after

    after, expected = run(), advance_reference(*given, 3)
    assert torch.equal(after.status, expected.status)
    assert math.isclose(expected.accepted.float().mean().item(), 0.5, abs_tol=0.4)
    torch.testing.assert_close(after.step, expected.step, rtol=1e-5, atol=0.0)
    benchmark(run)
