"""How fast a field is integrated here: this package's runners and torchdiffeq, same field, states and intervals."""

import importlib.util
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfd_fast.mean_velocity import mean_velocity
from mfd_fast.rollout.compiled import NotCompilable, compiled_field
from mfd_fast.types import Condition, VelocityField

FINE_STEP = 0.01
WARM_CALLS = 2


class Timing(NamedTuple):
    """One way to integrate, timed."""

    name: str
    milliseconds: float
    """Median of one mean velocity of the whole batch."""
    error: float
    """Relative root mean square error against fourth-order steps of 0.01."""
    evaluations: float
    """Mean evaluations charged to a row; lock-step libraries charge every row for the widest interval."""


def compare_runners(
    field: VelocityField,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    step_size: float = 0.02,
    condition: Condition | None = None,
    repeats: int = 7,
) -> list[Timing]:
    """Time Euler steps of at most ``step_size`` by every runner that can run ``field``, and by torchdiffeq.

    Args:
        field: the field.
        x: ``[B, ...]``, states at t.
        t: ``[B]``, starts.
        r: ``[B]``, ends.
        step_size: largest step.
        condition: keyword arguments of the field.
        repeats: timed calls of each; the median counts.

    Returns:
        Timings, fastest first.
    """
    variants: dict[str, dict[str, Any]] = {"eager": {"runner": "eager"}}
    try:
        compiled_field(field)
        variants["compiled"] = {"runner": "compiled"}
    except NotCompilable:
        pass
    if importlib.util.find_spec("torchdiffeq") is not None:
        variants["torchdiffeq"] = {"solver": "torchdiffeq:euler"}
    fine = mean_velocity(field, x, t, r, solver="rk4", step_size=FINE_STEP, condition=condition)

    def run(options: dict[str, Any]) -> tuple[Tensor, Any]:
        result: tuple[Tensor, Any] = mean_velocity(
            field, x, t, r, step_size=step_size, condition=condition, return_stats=True, **options
        )
        if x.is_cuda:  # pragma: no cover (gpu)
            torch.cuda.synchronize()
        return result

    timings = []
    for name, options in variants.items():
        for _ in range(WARM_CALLS):
            u, stats = run(options)
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            run(options)
            seconds.append(time.perf_counter() - begin)
        error = float((u - fine).norm() / fine.norm())
        evaluations = float(stats.evaluations.double().mean())
        timings.append(Timing(name, 1e3 * statistics.median(seconds), error, evaluations))
    return sorted(timings, key=lambda timing: timing.milliseconds)


def format_timings(timings: list[Timing]) -> str:
    """The timings as aligned text."""
    lines = [f"{'':12} {'ms':>9} {'slower':>7} {'error':>9} {'evaluations':>12}"]
    for timing in timings:
        slower = timing.milliseconds / timings[0].milliseconds
        lines.append(
            f"{timing.name:12} {timing.milliseconds:9.2f} {slower:6.2f}x {timing.error:9.1e} {timing.evaluations:12.1f}"
        )
    return "\n".join(lines)
