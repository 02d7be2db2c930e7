"""Sequential MLPs at small batches, where the cost of a call is not arithmetic: this package's runners and diffrax."""

import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mfd_fast
from clock import cpu_seconds
from mfd_fast.fields import sequential_mlp
from mfd_fast.intervals import LogitNormal, sample_pairs
from mfd_fast.rollout.execute import RUNNERS
from peers.loops import steps_of

ROWS = (1, 2, 4, 8, 16)
STEP_SIZE = 0.02
FEATURES = 2
CHUNKS = 10


class Problem(NamedTuple):
    """Some rows to integrate."""

    field: sequential_mlp
    x: Tensor
    t: Tensor
    r: Tensor

    def mean_velocity(self, runner: str) -> Tensor:
        """By this package, Euler 0.02."""
        u: Tensor = mfd_fast.mean_velocity(self.field, self.x, self.t, self.r, step_size=STEP_SIZE, runner=runner)
        return u


def make_problem(rows: int, width: int = 256, depth: int = 3) -> Problem:
    """A Sequential MLP over the state with its time as one more number, and logit-normal(-0.4, 1) intervals."""
    torch.manual_seed(0)
    sizes = [FEATURES + 1, *[width] * depth, FEATURES]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    field = sequential_mlp(nn.Sequential(*layers[:-1]).requires_grad_(False))
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, FEATURES, generator=generator)
    return Problem(field, x, *sample_pairs(LogitNormal(-0.4, 1.0), rows, generator=generator))


def diffrax_ways(problem: Problem) -> dict[str, Callable[[], Any]]:
    """The same mean velocities by diffrax: each row with its own steps, or all with those of the widest."""
    from peers.diffrax_peer import fixed_rows, rescaled_batch
    from peers.jax_networks import to_jax, translate

    row_field, parameters = translate(problem.field.field)
    steps = steps_of(problem.t, problem.r, STEP_SIZE)
    label = torch.zeros(len(steps), dtype=torch.int64)
    given = [parameters, *(to_jax(part) for part in (problem.x, problem.t, problem.r, label))]
    by_rows, rescaled = fixed_rows(row_field, "Euler"), rescaled_batch(row_field, "Euler")
    counts, most = to_jax(steps.float()), to_jax(steps.max().float())
    return {
        "rows": lambda: by_rows(*given, counts)[0].block_until_ready(),
        "rescaled": lambda: rescaled(*given, most)[0].block_until_ready(),
    }


def sequential_mlps(calls: int = 1000) -> list[dict[str, Any]]:
    """Microseconds of one mean velocity, Euler 0.02, by runner and batch size; the median over chunks of ``calls``."""
    from peers.jax_networks import to_torch

    lines = []
    for rows in tqdm(ROWS, desc="Sequential MLPs", unit="batch size"):
        problem = make_problem(rows)
        ways = {f"diffrax {how}": call for how, call in diffrax_ways(problem).items()}
        exact = to_torch(ways["diffrax rows"]())
        for runner in RUNNERS:
            if runner == "auto":
                continue
            try:
                own = problem.mean_velocity(runner)
            except ValueError:
                continue  # not on this device, or not for this field
            torch.testing.assert_close(own, exact, rtol=1e-3, atol=1e-4)
            ways[f"mfd_fast {runner}"] = functools.partial(problem.mean_velocity, runner)
        lines.append(_timed(rows, ways, calls))
    return lines


def _timed(rows: int, ways: dict[str, Any], calls: int) -> dict[str, Any]:
    each = max(1, calls // CHUNKS)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    for _ in range(CHUNKS):
        for name, call in ways.items():
            times[name].append(cpu_seconds(lambda call=call: [call() for _ in range(each)]) / each)
    medians = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    own = min((name for name in medians if name.startswith("mfd_fast")), key=medians.__getitem__)
    other = min((name for name in medians if name.startswith("diffrax")), key=medians.__getitem__)
    words = f"{own} {medians[own]:.0f} us, {other} {medians[other]:.0f} us: {medians[other] / medians[own]:.2f} times"
    return {"rows": rows, "calls": each * CHUNKS, "microseconds": medians, "ratio": medians[other] / medians[own],
            "words": words}  # fmt: skip
