"""The guided solver step and the copying of rows: definitions in torch, what inductor makes of them, Triton kernels.

    make bench

Before anything is timed each variant is compared with the definition. The clock waits for a GPU to finish. The number
of kernels that inductor generates is in the results (``kernels``); the Triton kernels are one each.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch._inductor import metrics

from mfd_fast.ops import launchers
from mfd_fast.ops.copy_rows import copy_rows, copy_rows_reference
from mfd_fast.ops.guided_step import ACTIVE, NUMBERS, STORE, SlotState, guided_step, guided_step_reference

SHAPES = [(8, 32768), (64, 4096)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
VARIANTS = [(name, device) for device in DEVICES for name in ("reference", "inductor")] + [("triton", "cuda")]
IDS = [f"{name}-{device}" for name, device in VARIANTS]


def ab2_state(rows: int, width: int, device: str) -> SlotState:
    """Rows in the middle of an AB2 rollout: every number of the step is in use."""
    generator = torch.Generator().manual_seed(0)
    x, displacement, memory = torch.randn(3, rows, width, generator=generator)
    coefficients = torch.zeros(7, rows)
    coefficients[ACTIVE], coefficients[STORE] = 1.0, 0.0
    coefficients[NUMBERS], coefficients[NUMBERS + 1] = -0.03, 0.01
    state = SlotState(x, displacement, memory[None].contiguous(), x.bfloat16(), coefficients)
    return SlotState(*(part.to(device) for part in state))


def find(variant: str, device: str, op: Any, reference: Any, name: str) -> Callable[..., None]:
    """The implementation, or skip where this machine has none."""
    if variant == "reference":
        return reference  # type: ignore[no-any-return]
    if variant == "inductor":
        torch._dynamo.reset()
        return torch.compile(reference, dynamic=False)
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if launchers.load(name, torch.device(device, 0)) is None:
        pytest.skip(f"no Triton kernels: {launchers.why_off(torch.device(device, 0))}")
    return op  # type: ignore[no-any-return]


def describe(benchmark: BenchmarkFixture, group: str, device: str, shape: tuple[int, int], kernels: int) -> None:
    benchmark.group = f"{group}, {shape[0]} rows of {shape[1]}"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPUs, 1 thread"
    benchmark.extra_info.update(torch=torch.__version__, device=name, shape=list(shape), kernels=kernels)


def timed(benchmark: BenchmarkFixture, run: Callable[[], None], device: str) -> None:
    def once() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    once()
    benchmark(once)


@pytest.mark.parametrize(("variant", "device"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_guided_step(benchmark: BenchmarkFixture, shape: tuple[int, int], variant: str, device: str) -> None:
    """AB2 with guidance: float32 state, bfloat16 network; one thread on the CPU."""
    torch.set_num_threads(1)
    step = find(variant, device, guided_step, guided_step_reference, "guided_step")
    conditional, negative = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    guidance = torch.full((shape[0],), 4.5, device=device)
    state, expected = ab2_state(*shape, device), ab2_state(*shape, device)
    metrics.reset()
    step(state, conditional, negative, guidance)
    kernels = metrics.generated_kernel_count
    guided_step_reference(expected, conditional, negative, guidance)
    for ours, theirs in zip(state, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    describe(benchmark, "guided step", device, shape, kernels)
    timed(benchmark, lambda: step(state, conditional, negative, guidance), device)


@pytest.mark.parametrize(("variant", "device"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_copy_rows(benchmark: BenchmarkFixture, shape: tuple[int, int], variant: str, device: str) -> None:
    """All rows in another order, from float32 to bfloat16."""
    torch.set_num_threads(1)
    copy = find(variant, device, copy_rows, copy_rows_reference, "copy_rows")
    source: Tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    rows, places = torch.arange(shape[0], device=device), torch.arange(shape[0], device=device).flip(0)
    target, expected = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    metrics.reset()
    copy(source, rows, target, places)
    kernels = metrics.generated_kernel_count
    copy_rows_reference(source, rows, expected, places)
    assert torch.equal(target, expected)
    describe(benchmark, "copy of rows", device, shape, kernels)
    timed(benchmark, lambda: copy(source, rows, target, places), device)
