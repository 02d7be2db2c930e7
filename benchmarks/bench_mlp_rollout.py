"""Rollouts of small MLPs: the fused runner against the other runners and diffrax, a few rows at a time.

    make bench

The network is an nn.Sequential that takes state and time side by side; Euler steps of at most 0.02, an interval of
its own for every row, one thread, CPU time. diffrax runs the same network under jit and vmap with as many steps in each
row. Every variant must give the numbers of ``runner="eager"`` before it is timed.
"""

import functools
import time
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from small_networks import STEP_SIZE, Problem, diffrax_ways, make_problem

CALLS = 1000
SHAPES = [(64, 2), (128, 3), (256, 3), (512, 4)]
ROWS = [1, 4, 16]
VARIANTS = ["eager", "compiled", "fused", "diffrax"]


@functools.cache
def problem(width: int, depth: int, rows: int) -> Problem:
    """Field, states and intervals."""
    return make_problem(rows, width, depth)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("width", "depth"), SHAPES)
@pytest.mark.benchmark(timer=time.process_time, warmup=False)
def bench_mlp_rollout(benchmark: BenchmarkFixture, width: int, depth: int, rows: int, variant: str) -> None:
    """Euler 0.02, float32, one thread; a round is many calls, because a clock of CPU time is coarse."""
    torch.set_num_threads(1)
    given = problem(width, depth, rows)
    benchmark.group = f"MLP rollout, width {width}, depth {depth}, {rows} rows"
    benchmark.extra_info.update(torch=torch.__version__, threads=1, step_size=STEP_SIZE, dtype="float32", clock="CPU")
    expected = given.mean_velocity("eager")
    run: Any = functools.partial(given.mean_velocity, variant)
    if variant == "diffrax":
        pytest.importorskip("diffrax", reason="diffrax is not installed: pip install 'mfd_fast[peers]'")
        run = diffrax_ways(given)["rows"]
    actual = torch.tensor(run().tolist())
    # Both round differently; a mean over a short interval carries the rounding of x divided by its width.
    assert float((actual - expected).norm()) <= 2e-4 * float(expected.norm())
    cheap = variant in ("fused", "diffrax")
    benchmark.pedantic(run, rounds=10, iterations=CALLS // 10 if cheap else CALLS // 100, warmup_rounds=1)
