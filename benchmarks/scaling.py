"""How the time of a mean velocity grows with batch, step size, width and depth: this package and lock-step loops.

The networks are DiTs with random weights: only their time is measured. Euler steps, float32, no guidance.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import mfd_fast
from clock import cpu_seconds
from mfd_fast.intervals import LogitNormal, sample_pairs
from mfd_fast.models import build_model
from peers.guided import conditional
from peers.libraries import torchdiffeq_same_numbers

BASE = {"rows": 32, "step_size": 0.05, "width": 128, "depth": 4}
AXES: dict[str, tuple[float, ...]] = {
    "rows": (1, 4, 16, 64),
    "step_size": (0.2, 0.1, 0.05, 0.02),
    "width": (64, 128, 256),
    "depth": (2, 4, 8),
}


def scaling(repeats: int = 3) -> dict[str, Any]:
    """Seconds by axis, value and way; each axis varies one number of `BASE`."""
    found: dict[str, Any] = {"base": BASE}
    for axis, values in AXES.items():
        found[axis] = {
            str(value): _measure({**BASE, axis: value}, repeats) for value in tqdm(values, desc=f"scaling of {axis}")
        }
    return found


def _measure(case: dict[str, Any], repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    field = build_model(
        "dit", (1, 8, 8), 10, width=int(case["width"]), depth=int(case["depth"]), heads=4
    ).requires_grad_(False)
    for parameter in field.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    rows, step_size = int(case["rows"]), case["step_size"]
    t, r = sample_pairs(LogitNormal(-0.4, 1.0), rows)
    x, label = torch.randn(rows, 1, 8, 8), torch.randint(10, (rows,))

    def own(runner: str) -> Callable[[], Tensor]:
        return lambda: mfd_fast.mean_velocity(
            field, x, t, r, step_size=step_size, runner=runner, condition={"label": label}
        )

    def library() -> Tensor:
        with torch.no_grad():
            return torchdiffeq_same_numbers(conditional(field), x, t, r, label, step_size)

    ways = {"compiled": own("compiled"), "eager": own("eager"), "torchdiffeq": library}
    expected = library()
    for call in ways.values():
        torch.testing.assert_close(call(), expected, rtol=1e-3, atol=1e-3)
    seconds = {name: float("inf") for name in ways}
    for _ in range(repeats):
        for name, call in ways.items():
            seconds[name] = min(seconds[name], cpu_seconds(call))
    return seconds
