"""One pair of mean velocities of the trained MLP, 64 rows with intervals of their own, by every way there is.

    make bench

Euler steps of at most 0.02, guided teacher and auxiliary. Each way is checked against this package's numbers before it
is timed. The DiT, where calls take seconds, is compared by ``compare.py``.
"""

import functools
import importlib.util

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from contenders import Diffrax, DiffraxChoice, Own, Way, euler, torch_peers
from fields import trained_pair
from workload import gradient_error, make_draw

SAME_NUMBERS = 1e-4
OTHERWISE = 0.1
"""Largest difference of gradients of ways with smaller steps in narrow rows, or with the released loop's rounding."""
OWN = ("eager", "compiled", "fused")


@functools.cache
def ways() -> dict[str, Way]:
    """Every way by a short name."""
    pair = trained_pair("mlp")
    found = {f"mfd_fast {runner}": Own(pair).way(euler(), runner=runner) for runner in OWN}
    found |= {way.name: way for way in torch_peers(pair)}
    if importlib.util.find_spec("diffrax") is not None:
        found["diffrax"] = Diffrax(pair).way(DiffraxChoice("rescaled", "Euler", 40))
    return found


NAMES = [*(f"mfd_fast {runner}" for runner in OWN), "torchdiffeq Euler 0.02, same numbers",
         "torchdiffeq Euler 0.02, rescaled", "torchode Euler 0.02", "eager lock-step Euler 0.02",
         "row by row Euler 0.02", "released loop, float32", "diffrax"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def bench_mean_velocity(benchmark: BenchmarkFixture, name: str) -> None:
    """float32, one thread."""
    for library in ("torchode", "diffrax"):
        if name.startswith(library):
            pytest.importorskip(library, reason=f"{library} is not installed: pip install 'mfd_fast[peers]'")
    torch.set_num_threads(1)
    draw = make_draw(0)
    way = ways()[name]
    benchmark.group = "pair of mean velocities, MLP, 64 rows"
    benchmark.extra_info.update(torch=torch.__version__, threads=1, dtype="float32", clock="CPU time")
    error = gradient_error(way.run(draw), ways()["mfd_fast eager"].run(draw))
    assert error <= (SAME_NUMBERS if way.same_numbers else OTHERWISE)
    benchmark(way.run, draw)
