"""Rollouts of small MLPs: the fused runner against the other runners and diffrax, a few rows at a time.

    make bench

The network is an nn.Sequential that takes state and time side by side; Euler steps of at most 0.02, an interval of
its own for every row, one thread, CPU time. diffrax runs the same network under jit and vmap with as many steps in each
row. Every variant must give the numbers of ``runner="eager"`` before it is timed.
"""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import mfd_fast
from mfd_fast.fields import sequential_mlp
from mfd_fast.intervals import LogitNormal, sample_pairs

STEP_SIZE = 0.02
CALLS = 1000
FEATURES = 2
SHAPES = [(64, 2), (128, 3), (256, 3), (512, 4)]
ROWS = [1, 4, 16]
VARIANTS = ["eager", "compiled", "fused", "diffrax"]

Run = Callable[[], Any]


@functools.cache
def problem(width: int, depth: int, rows: int) -> tuple[sequential_mlp, Tensor, Tensor, Tensor]:
    """Field, states and intervals."""
    torch.manual_seed(0)
    sizes = [FEATURES + 1, *[width] * depth, FEATURES]
    layers: list[nn.Module] = []
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):  # noqa: RUF007
        layers += [nn.Linear(before, after), nn.SiLU()]
    t, r = sample_pairs(LogitNormal(-0.4, 1.0), rows, generator=torch.Generator().manual_seed(1))
    return sequential_mlp(nn.Sequential(*layers[:-1]).requires_grad_(False)), torch.randn(rows, FEATURES), t, r


def diffrax_euler(field: sequential_mlp, x: Tensor, t: Tensor, r: Tensor) -> Run:
    """The mean velocity by diffrax: compiled, with the weights as arguments, rows by vmap."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    diffrax = pytest.importorskip("diffrax", reason="diffrax is not installed")
    import jax
    import jax.numpy as jnp

    linears = [layer for layer in field.field if isinstance(layer, nn.Linear)]
    weights = [(jnp.asarray(layer.weight.numpy().T.copy()), jnp.asarray(layer.bias.numpy())) for layer in linears]

    def velocity(now: Any, state: Any, layers: Any) -> Any:
        hidden = jnp.concatenate([state, now[None]])
        for weight, bias in layers[:-1]:
            hidden = jax.nn.silu(hidden @ weight + bias)
        weight, bias = layers[-1]
        return hidden @ weight + bias

    def row(layers: Any, x: Any, t: Any, r: Any, steps: Any) -> Any:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(velocity),
            diffrax.Euler(),
            t,
            r,
            (r - t) / steps,
            x,
            args=layers,
            stepsize_controller=diffrax.ConstantStepSize(),
            adjoint=diffrax.ForwardMode(),
            max_steps=None,
        )
        return (solution.ys[0] - x) / (r - t)

    rows = jax.jit(jax.vmap(row, in_axes=(None, 0, 0, 0, 0)))
    steps = ((t - r).abs() / STEP_SIZE - 1e-6).ceil().clamp(min=1)
    arguments = [jnp.asarray(part.numpy()) for part in (x, t, r, steps)]
    return lambda: rows(weights, *arguments).block_until_ready()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("width", "depth"), SHAPES)
@pytest.mark.benchmark(timer=time.process_time, warmup=False)
def bench_mlp_rollout(benchmark: BenchmarkFixture, width: int, depth: int, rows: int, variant: str) -> None:
    """Euler 0.02, float32, one thread; a round is many calls, because a clock of CPU time is coarse."""
    torch.set_num_threads(1)
    field, x, t, r = problem(width, depth, rows)
    benchmark.group = f"MLP rollout, width {width}, depth {depth}, {rows} rows"
    benchmark.extra_info.update(torch=torch.__version__, threads=1, step_size=STEP_SIZE, dtype="float32", clock="CPU")
    expected = mfd_fast.mean_velocity(field, x, t, r, step_size=STEP_SIZE, runner="eager")
    run = (
        diffrax_euler(field, x, t, r)
        if variant == "diffrax"
        else functools.partial(mfd_fast.mean_velocity, field, x, t, r, step_size=STEP_SIZE, runner=variant)
    )
    actual = torch.as_tensor(run().__array__() if variant == "diffrax" else run())
    # Both round differently; a mean over a short interval carries the rounding of x divided by its width.
    assert float((actual - expected).norm()) <= 2e-4 * float(expected.norm())
    cheap = variant in ("fused", "diffrax")
    benchmark.pedantic(run, rounds=10, iterations=CALLS // 10 if cheap else CALLS // 100, warmup_rounds=1)
