"""How fast a field is integrated here: this package's runners and torchdiffeq, same field, states and intervals."""

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfd_fast.mean_velocity import mean_velocity, mean_velocity_pair
from mfd_fast.rollout.execute import RUNNERS
from mfd_fast.types import Condition, VelocityField

FINE_STEP = 0.01


class Timing(NamedTuple):
    """One way to integrate, timed."""

    name: str
    milliseconds: float
    """Median of one mean velocity of the whole batch."""
    error: float
    """Relative root mean square error against fourth-order steps of 0.01."""
    evaluations: float
    """Mean network rows charged to a sample; lock-step libraries charge every row for the widest interval."""


def compare_runners(
    field: VelocityField,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    auxiliary: VelocityField | None = None,
    step_size: float = 0.02,
    condition: Condition | None = None,
    negative_condition: Condition | None = None,
    guidance_scale: float = 1.0,
    field_dtype: torch.dtype | None = None,
    repeats: int = 7,
) -> list[Timing]:
    """Time Euler steps of at most ``step_size`` by every runner that can run ``field``, and by torchdiffeq.

    Args:
        field: the field.
        x: ``[B, ...]``, states at t.
        t: ``[B]``, starts.
        r: ``[B]``, ends.
        auxiliary: with it the pair is integrated, and the error is that of ``u_field - u_auxiliary``.
        step_size: largest step.
        condition: keyword arguments of the field.
        negative_condition: as in `mfd_fast.mean_velocity`.
        guidance_scale: as in `mfd_fast.mean_velocity`; the auxiliary is not guided.
        field_dtype: as in `mfd_fast.mean_velocity`.
        repeats: timed calls of each; the median counts.

    Returns:
        Timings, fastest first. A runner that is not possible for this field or on this device is left out.

    Raises:
        TypeError, ValueError: as `mfd_fast.mean_velocity`.
    """
    shared: dict[str, Any] = {
        "condition": condition,
        "negative_condition": negative_condition,
        "guidance_scale": guidance_scale,
        "field_dtype": field_dtype,
    }

    def run(**options: Any) -> tuple[Tensor, Tensor]:
        options = {"step_size": step_size, **shared, **options}
        if auxiliary is None:
            u, stats = mean_velocity(field, x, t, r, return_stats=True, **options)
            evaluations = stats.evaluations
        else:
            first, second, pair = mean_velocity_pair(field, auxiliary, x, t, r, return_stats=True, **options)
            u, evaluations = first - second, pair.teacher.evaluations + pair.auxiliary.evaluations
        if x.is_cuda:  # pragma: no cover (gpu)
            torch.cuda.synchronize(x.device)
        return u, evaluations

    fine, _ = run(solver="rk4", step_size=FINE_STEP, runner="eager")
    variants: dict[str, dict[str, Any]] = {name: {"runner": name} for name in RUNNERS if name != "auto"}
    if importlib.util.find_spec("torchdiffeq") is not None:
        variants["torchdiffeq"] = {"solver": "torchdiffeq:euler", "runner": "eager"}
    timings = []
    for name, options in variants.items():
        try:
            run(**options)
        except ValueError:
            if name == "eager":  # which can run everything: an argument is wrong
                raise
            continue
        u, evaluations = run(**options)
        seconds = statistics.median(_seconds(partial(run, **options)) for _ in range(repeats))
        error = float((u - fine).norm() / fine.norm())
        timings.append(Timing(name, 1e3 * seconds, error, float(evaluations.double().mean())))
    return sorted(timings, key=lambda timing: timing.milliseconds)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def format_timings(timings: list[Timing]) -> str:
    """The timings as aligned text."""
    lines = [f"{'':12} {'ms':>9} {'slower':>7} {'error':>9} {'evaluations':>12}"]
    for timing in timings:
        slower = timing.milliseconds / timings[0].milliseconds
        lines.append(
            f"{timing.name:12} {timing.milliseconds:9.2f} {slower:6.2f}x {timing.error:9.1e} {timing.evaluations:12.1f}"
        )
    return "\n".join(lines)
