"""Mean velocities of one field, 64 rows with intervals of their own: this package against the usual ways.

    make bench

Every variant takes Euler steps of at most 0.02 on the same network, states and intervals. Before it is timed it is
checked against a fine solution: none may be less accurate than three times this package's own error.
"""

import functools
from collections.abc import Callable

import peers
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import mfd_fast
from mfd_fast.intervals import LogitNormal, sample_pairs
from mfd_fast.models import build_model

STEP_SIZE = 0.02
ROWS = 64

Integrate = Callable[..., Tensor]
VARIANTS: dict[str, Integrate] = {
    "mfd_fast": lambda field, x, t, r, h: mfd_fast.mean_velocity(field, x, t, r, step_size=h),
    "mfd_fast, compiled": lambda field, x, t, r, h: mfd_fast.mean_velocity(
        field, x, t, r, step_size=h, runner="compiled"
    ),
    "lock-step": peers.lock_step,
    "torchdiffeq": peers.torchdiffeq_euler,
    "torchode": peers.torchode_euler,
    "row-by-row": peers.row_by_row,
}


@functools.cache
def problem(name: str) -> tuple[torch.nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """Field, states, starts, ends and the fine solution."""
    torch.manual_seed(0)
    options = {"width": 256, "depth": 3} if name == "mlp" else {"width": 128, "depth": 4, "heads": 4}
    field = build_model(name, (1, 8, 8), **options).requires_grad_(False)
    for parameter in field.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    t, r = sample_pairs(LogitNormal(-0.4, 1.0), ROWS)
    x = torch.randn(ROWS, 1, 8, 8)
    return field, x, t, r, mfd_fast.mean_velocity(field, x, t, r, solver="rk4", step_size=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("network", ["mlp", "dit"])
def bench_mean_velocity(benchmark: BenchmarkFixture, network: str, variant: str) -> None:
    """Euler 0.02, float32, one thread."""
    if variant == "torchode":
        pytest.importorskip("torchode", reason="torchode is not installed: pip install 'mfd_fast[peers]'")
    torch.set_num_threads(1)
    field, x, t, r, fine = problem(network)
    benchmark.group = f"mean velocity, {network}, {ROWS} rows"
    benchmark.extra_info.update(torch=torch.__version__, threads=1, step_size=STEP_SIZE, dtype="float32")

    def run(name: str) -> Tensor:
        with torch.no_grad():
            return VARIANTS[name](field, x, t, r, STEP_SIZE)

    def error(u: Tensor) -> float:
        return float((u - fine).norm() / fine.norm())

    own = error(run("mfd_fast"))
    assert error(run(variant)) <= 3 * own
    benchmark(run, variant)
