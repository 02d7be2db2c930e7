"""Sequential MLPs at small batches, where the cost of a call is not arithmetic: this package's runners and diffrax."""

import itertools
import statistics
from typing import Any

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
CHUNKS = 10


def make_field(features: int = 2, width: int = 256, depth: int = 3) -> sequential_mlp:
    """A Sequential MLP over the state with its time as one more number."""
    torch.manual_seed(0)
    sizes = [features + 1, *[width] * depth, features]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return sequential_mlp(nn.Sequential(*layers[:-1]).requires_grad_(False))


def sequential_mlps(calls: int = 1000) -> list[dict[str, Any]]:
    """Microseconds of one mean velocity, Euler 0.02, by runner and batch size; the median over chunks of ``calls``."""
    from peers.diffrax_peer import fixed_rows, rescaled_batch
    from peers.jax_networks import to_jax, to_torch, translate

    field = make_field()
    row_field, parameters = translate(field.field)
    solves = {"rows": fixed_rows(row_field, "Euler"), "rescaled": rescaled_batch(row_field, "Euler")}
    lines = []
    for rows in tqdm(ROWS, desc="Sequential MLPs", unit="batch size"):
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, 2, generator=generator)
        t, r = sample_pairs(LogitNormal(-0.4, 1.0), rows, generator=generator)
        steps = steps_of(t, r, STEP_SIZE)
        given = [to_jax(part) for part in (x, t, r, torch.zeros(rows, dtype=torch.int64))]
        counts = {"rows": to_jax(steps.float()), "rescaled": float(steps.max())}
        ways = {
            f"diffrax {how}": lambda how=how, given=given, counts=counts: solves[how](parameters, *given, counts[how])[
                0
            ].block_until_ready()
            for how in solves
        }
        exact = to_torch(ways["diffrax rows"]())
        for runner in RUNNERS:
            if runner == "auto":
                continue

            def run(runner: str = runner, x: Tensor = x, t: Tensor = t, r: Tensor = r) -> Tensor:
                u: Tensor = mfd_fast.mean_velocity(field, x, t, r, step_size=STEP_SIZE, runner=runner)
                return u

            try:
                own = run()
            except ValueError:
                continue  # not on this device, or not for this field
            torch.testing.assert_close(own, exact, rtol=1e-3, atol=1e-4)
            ways[f"mfd_fast {runner}"] = run
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
