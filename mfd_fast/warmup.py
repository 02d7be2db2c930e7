"""`warmup`: compile a field once, with its cost shown, and let ``runner="auto"`` use what is faster."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfd_fast.mean_velocity import mean_velocity, mean_velocity_pair
from mfd_fast.ops.mlp_program import DescribesItself
from mfd_fast.ops.mlp_rollout import why_unavailable
from mfd_fast.rollout.captured import why_not_captured
from mfd_fast.rollout.compiled import Measured, NotCompilable, compiled_field, network_of, remember
from mfd_fast.rollout.identity import Unknown, identity_of
from mfd_fast.rollout.runners import NotPossible
from mfd_fast.rows import map_tensors
from mfd_fast.types import Condition, VelocityField

STEPS = 8
REPEATS = 5
GAIN = 1.05
"""How many times faster than eager a runner must be to be chosen."""
WORDS = {
    "compiled": "the compiled copy is",
    "fused": "the fused rollout is",
    "captured": "recorded evaluations are",
}


class WarmupReport(NamedTuple):
    """What a warm-up found."""

    runner: str
    """What ``runner="auto"`` uses for this field from now on."""
    reason: str
    """Why, in words."""
    seconds: dict[str, float]
    """Median seconds of a rollout of 8 Euler steps, by runner; empty if there was nothing to choose."""
    compile_seconds: float
    """What compiling took, 0 if it was not possible."""


def warmup(
    field: VelocityField,
    x: Tensor,
    *,
    auxiliary: VelocityField | None = None,
    condition: Condition | None = None,
    negative_condition: Condition | None = None,
    guidance_scale: float | Tensor = 1.0,
    field_dtype: torch.dtype | None = None,
) -> WarmupReport:
    """Compile ``field`` for batches like ``x`` and any smaller ones, measure, and choose for ``runner="auto"``.

    Takes seconds to minutes and is worth it before a training. The field's module is not changed; its weights may
    change in any way afterwards. One batch size above 1 serves all others.

    Args:
        field: a module, or a wrapper of `mfd_fast.fields` around one.
        x: ``[B, ...]``, a typical batch.
        auxiliary: with it the pair is compiled and measured, as `mfd_fast.mean_velocity_pair` runs it.
        condition: as in `mfd_fast.mean_velocity`.
        negative_condition: as in `mfd_fast.mean_velocity`.
        guidance_scale: as in `mfd_fast.mean_velocity`.
        field_dtype: as in `mfd_fast.mean_velocity`.

    Raises:
        TypeError, ValueError: as `mfd_fast.mean_velocity`.
    """
    both = [field] if auxiliary is None else [field, auxiliary]
    found, why = _candidates(both, x.device)
    if not found:
        return WarmupReport("eager", why, {}, 0.0)
    rows_of: dict[str, Any] = {"condition": condition, "negative_condition": negative_condition}
    integrate: Any = mean_velocity if auxiliary is None else mean_velocity_pair

    def run(runner: str, rows: int) -> float:
        begin = time.perf_counter()
        integrate(
            *both,
            x[:rows],
            1.0,
            0.0,
            steps=STEPS,
            guidance_scale=_cut(guidance_scale, rows),
            field_dtype=field_dtype,
            runner=runner,
            **{name: _cut(value, rows) for name, value in rows_of.items()},
        )
        if x.is_cuda:  # pragma: no cover (gpu)
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - begin

    begin = time.perf_counter()
    # A batch of one row is a graph of its own for the compiler; every other size shares one.
    failed = _try(found, lambda runner: [run(runner, rows) for rows in {1, max(1, x.shape[0] // 2), x.shape[0]}])
    compile_seconds = time.perf_counter() - begin
    runners = ["eager", *(runner for runner in found if runner not in failed)]
    if len(runners) == 1:
        _remember(both, None)
        return WarmupReport("eager", "; ".join(failed.values()), {}, 0.0)
    seconds = {runner: statistics.median(run(runner, x.shape[0]) for _ in range(REPEATS)) for runner in runners}
    return _choose(both, seconds, x.shape[0], compile_seconds)


def _candidates(fields: list[VelocityField], device: torch.device) -> tuple[list[str], str]:
    """Runners other than eager that are worth trying for all of the fields, and why others are not."""
    found, reasons = [], []
    try:
        for field in fields:
            compiled_field(field)
        found.append("compiled")
    except NotCompilable as why:
        reasons.append(str(why))
    if why_unavailable(device) is None and all(isinstance(field, DescribesItself) for field in fields):
        found.append("fused")
    if why_not_captured(device) is None:
        try:
            for field in fields:
                identity_of(field)
            found.append("captured")
        except Unknown as why_unknown:
            reasons.append(str(why_unknown))
    return found, "; ".join(dict.fromkeys(reasons))


def _try(runners: list[str], run: Callable[[str], object]) -> dict[str, str]:
    """Run each of them; what went wrong with some, in words."""
    # Imported here because it takes longer than the rest of the package together.
    from torch._dynamo.exc import TorchDynamoException

    failed = {}
    for runner in runners:
        try:
            run(runner)
        except TorchDynamoException as error:
            failed[runner] = f"torch.compile failed: {str(error).splitlines()[0]}"
        except ValueError as error:
            if not isinstance(error.__cause__, NotPossible):
                raise
            failed[runner] = str(error)
    return failed


def _choose(fields: list[VelocityField], seconds: dict[str, float], rows: int, compile_seconds: float) -> WarmupReport:
    """Let ``auto`` use what is faster than eager by `GAIN`, the fastest first."""
    gains = {runner: seconds["eager"] / seconds[runner] for runner in seconds if runner != "eager"}
    best = max(gains, key=lambda runner: gains[runner])
    words = f"{WORDS[best]} {gains[best]:.2f} times as fast on {rows} rows"
    faster = tuple(sorted((runner for runner in gains if gains[runner] > GAIN), key=lambda runner: -gains[runner]))
    _remember(fields, Measured(faster, words) if faster else None)
    return WarmupReport(faster[0] if faster else "eager", words, seconds, compile_seconds)


def _remember(fields: list[VelocityField], measured: Measured | None) -> None:
    for field in fields:
        module = network_of(field)
        assert module is not None, "a field that a runner other than eager can run has a network"
        remember(module, measured)


def _cut(value: Any, rows: int) -> Any:
    """The first rows of a condition, a scale or nothing; what all rows share stays."""
    if isinstance(value, Mapping):
        return map_tensors(value, lambda tensor: _cut(tensor, rows))
    if isinstance(value, Tensor) and value.dim() and value.shape[0] != 1:
        return value[:rows]
    return value
