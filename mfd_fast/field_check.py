"""Does a field follow the convention of `mfd_fast.path`? If not, which wrapper of `mfd_fast.fields` makes it do so?

The velocity of the path is the field with the least flow-matching loss, so a trained field is read in each of the known
conventions and the reading with the least loss is the convention it was trained in.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfd_fast.fields import from_data_prediction, from_noise_prediction, negated, reversed_time, scaled_time
from mfd_fast.path import conditional_velocity, interpolate
from mfd_fast.rollout.checks import check_condition
from mfd_fast.rows import select_rows
from mfd_fast.types import Condition

Field = Callable[..., Tensor]

CHUNK = 64
TIME_RANGE = (0.05, 0.95)
LARGEST_LOSS = 4.0
"""Losses of single rows are cut here, in units of the baseline, so that a wrong reading near t = 0 stays bounded."""


@dataclass(frozen=True)
class FieldReport:
    """What `check_field` found."""

    ok: bool
    """Whether every check passed and the field, as it is, follows the convention."""
    lines: list[str]
    """The findings, a line each."""
    suggestion: str | None
    """The first thing to change, as code, where it is known."""
    reading: str | None
    """The convention that fits best, None if none could be told."""


class Reading(NamedTuple):
    """A convention a field may follow and the wrappers that translate it."""

    name: str
    code: str
    wrap: Callable[[Field], Field]


FORMS: dict[str, tuple[Callable[..., Field], ...]] = {
    "as it is": (),
    "negated": (negated,),
    "reversed time": (reversed_time,),
    "reversed time, velocity noise - data": (reversed_time, negated),
    "data prediction": (from_data_prediction,),
    "noise prediction": (from_noise_prediction,),
    "data prediction, reversed time": (reversed_time, negated, from_data_prediction),
    "noise prediction, reversed time": (reversed_time, negated, from_noise_prediction),
}
"""What is predicted and which way time runs, with the wrappers for it, the innermost first."""
LONG_TIME = "time times 1000"


def _reading(form: str, long: bool) -> Reading:
    """A form whose network is told t, or 1000 t."""
    code = "mfd_fast.fields.scaled_time(field, 1000)" if long else "field"
    for wrapper in FORMS[form]:
        code = f"mfd_fast.fields.{wrapper.__name__}({code})"

    def wrap(field: Field) -> Field:
        inner: Field = scaled_time(field, 1000) if long else field
        return reduce(lambda wrapped, wrapper: wrapper(wrapped), FORMS[form], inner)

    name = form if not long else LONG_TIME if not FORMS[form] else f"{form}, {LONG_TIME}"
    return Reading(name, code, wrap)


READINGS = tuple(_reading(form, long) for long in (False, True) for form in FORMS)


class Finding(NamedTuple):
    """One line of a report, and what to do about it."""

    mark: str
    text: str
    remedy: str | None = None


class Batch(NamedTuple):
    """Points of the path with the velocity that a field should predict on average."""

    x: Tensor
    t: Tensor
    condition: Condition
    target: Tensor


def check_field(
    field: Field, data: Tensor, *, condition: Condition | None = None, seed: int = 0, rows: int = 512
) -> FieldReport:
    """Check how a trained field behaves and which convention of sign, time and prediction it follows.

    Args:
        field: ``field(x [B, ...], t [B], **condition) -> [B, ...]``. It is called about twenty times on ``rows`` rows.
        data: ``[N, ...]`` samples of what the field was trained on, at least 2; more rows tell more.
        condition: keyword arguments of the field; tensors have leading dimension N or 1.
        seed: seed of times and noise.
        rows: points of the path that are tried; samples are used again when there are fewer.

    Raises:
        ValueError, TypeError: data or condition cannot be used. What is wrong with the field is in the report.
    """
    batch = _make_batch(data, condition, seed, rows)
    findings: list[Finding] = []
    reading = None
    with torch.no_grad():
        findings += _behaviour(field, batch)
        if all(finding.mark != "FAILED" for finding in findings):
            reading, conclusions = _convention(field, batch)
            findings += conclusions
    return FieldReport(
        ok=all(finding.mark != "FAILED" for finding in findings),
        lines=[f"{finding.mark:<6}  {finding.text}" for finding in findings],
        suggestion=next((finding.remedy for finding in findings if finding.remedy), None),
        reading=reading,
    )


def failed_call(x: Tensor, t: Tensor, condition: Condition, error: Exception) -> str:
    """What a field was given, and what it raised then."""
    given = {"x": x, "t": t, **condition}
    shown = (
        f"{name} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, Tensor)
        else f"{name} {type(value).__name__}"
        for name, value in given.items()
    )
    return f"field({', '.join(shown)}) raised {type(error).__name__}: {error}"


def _make_batch(data: Tensor, condition: Condition | None, seed: int, rows: int) -> Batch:
    if not isinstance(data, Tensor) or not data.is_floating_point():
        raise TypeError(f"data must be a floating-point tensor, got {getattr(data, 'dtype', type(data).__name__)}")
    if data.dim() < 2 or data.shape[0] < 2:
        raise ValueError(f"data must have shape [N, ...] with N at least 2, got {tuple(data.shape)}")
    if not bool(data.isfinite().all()):
        raise ValueError("data must be finite, got NaN or infinity")
    if rows < 16:
        raise ValueError(f"rows must be at least 16, got {rows}")
    dtype = torch.float64 if data.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(rows, device=data.device) % data.shape[0]
    samples = data[index].to(dtype)
    low, high = TIME_RANGE
    # One time in each of `rows` equal parts of the range, in random order.
    order = torch.randperm(rows, generator=generator, device="cpu")
    places = (order + torch.rand(rows, generator=generator, device="cpu")) / rows
    t = (low + (high - low) * places).to(samples)
    # Drawn after the times: data that were drawn from the same seed must not come out equal to their noise.
    noise = torch.randn(samples.shape, generator=generator, dtype=dtype, device="cpu").to(samples)
    chosen = select_rows(check_condition("condition", condition, data), index)
    return Batch(interpolate(samples, noise, t), t, chosen, conditional_velocity(samples, noise))


def _behaviour(field: Field, batch: Batch) -> Iterator[Finding]:
    """Findings about a field as a function, whatever its convention; ends with the first failure."""
    if layer := _training_layer(field):
        text = f"mode: the module is in training mode and contains {layer}; a field must be in evaluation mode"
        yield Finding("FAILED", text, "field.eval()")
        return
    given = _rows(batch, 0, CHUNK)
    try:
        velocity = _call(field, given)
    except Exception as error:
        # The field is the user's code: whatever it raises is the finding.
        yield Finding("FAILED", f"call: {failed_call(given.x, given.t, given.condition, error)}")
        return
    for check in (_shape, _dtype, _finite, _purity, _repeatability, _row_independence, _time_dependence):
        try:
            finding = check(field, batch, given, velocity)
        except Exception as error:
            text = f"call: another call (repeated, a single row or other times) raised {type(error).__name__}: {error}"
            finding = Finding("FAILED", text)
        yield finding
        if finding.mark == "FAILED":
            return


def _shape(field: Field, batch: Batch, given: Batch, velocity: Any) -> Finding:
    expected = list(given.x.shape)
    if not isinstance(velocity, Tensor) or list(velocity.shape) != expected:
        got = list(velocity.shape) if isinstance(velocity, Tensor) else type(velocity).__name__
        return Finding("FAILED", f"shape: the result must be a tensor of shape {expected} like x, got {got}")
    return Finding("ok", f"shape: {expected}, as x")


def _dtype(field: Field, batch: Batch, given: Batch, velocity: Tensor) -> Finding:
    if not velocity.is_floating_point():
        return Finding("FAILED", f"dtype: the result must be floating point, got {velocity.dtype}")
    return Finding("ok", f"dtype: {velocity.dtype} for x in {given.x.dtype}")


def _finite(field: Field, batch: Batch, given: Batch, velocity: Tensor) -> Finding:
    bad = ~velocity.isfinite().flatten(1).all(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        return Finding("FAILED", f"finite: NaN or infinity in row {row}, at time {float(batch.t[row]):.3f}")
    return Finding("ok", "finite: all values")


def _purity(field: Field, batch: Batch, given: Batch, velocity: Tensor) -> Finding:
    for name, kept, after in (("x", batch.x, given.x), ("t", batch.t, given.t)):
        if not torch.equal(kept[: len(after)], after):
            return Finding("FAILED", f"input: the field changes {name} in place; it must work on a copy")
    return Finding("ok", "input: left as it is")


def _repeatability(field: Field, batch: Batch, given: Batch, velocity: Tensor) -> Finding:
    difference = _relative(_call(field, given), velocity)
    if difference <= _tolerance(velocity):
        return Finding("ok", "repeatable: two calls agree")
    module = _module(field)
    training = module is not None and module.training
    hint = "the module is in training mode (dropout?)" if training else "does it draw random numbers?"
    text = f"repeatable: two calls with the same input differ by {difference:.1e} of the velocity; {hint}"
    return Finding("FAILED", text, "field.eval()" if training else None)


def _row_independence(field: Field, batch: Batch, given: Batch, velocity: Tensor) -> Finding:
    for row in range(4):
        difference = _relative(_call(field, _rows(batch, row, row + 1)), velocity[row : row + 1])
        if difference > _tolerance(velocity):
            text = f"rows: row {row} alone and in a batch of {len(given.x)} differ by {difference:.1e} of the velocity"
            return Finding("FAILED", f"{text}; does a layer mix rows (batch norm)?")
    return Finding("ok", "rows: a row alone gets what it gets in a batch")


def _time_dependence(field: Field, batch: Batch, given: Batch, velocity: Tensor) -> Finding:
    if torch.equal(_call(field, given._replace(t=1 - given.t)), velocity):
        return Finding("FAILED", "time: the field does not depend on t; is it trained, and is t handed to the network?")
    return Finding("ok", "time: the field depends on t")


def _convention(field: Field, batch: Batch) -> tuple[str | None, list[Finding]]:
    """The reading with the least flow-matching loss, if one stands out, and what to say about it."""
    constant = _row_means((batch.target - batch.target.mean(0)).square())
    baseline = constant.mean()
    losses = {}
    for reading in READINGS:
        error = _velocity(reading.wrap(field), batch) - batch.target
        losses[reading] = (_row_means(error.square()) / baseline).nan_to_num(nan=torch.inf).clamp(max=LARGEST_LOSS)
    ranked = sorted(READINGS, key=lambda reading: float(losses[reading].mean()))
    table = [Finding("", "flow-matching loss of each reading of the field; 1 is the best constant velocity")]
    table += [Finding("", f"loss {float(losses[reading].mean()):.3f}: {reading.name}") for reading in ranked]

    best = ranked[0]
    if not _clearly_less(losses[best], constant / baseline):
        return None, [*table, Finding("FAILED", "convention: inconclusive: the field explains none of the variance")]
    close = [reading.name for reading in ranked if not _clearly_less(losses[best], losses[reading])]
    if len(close) > 1:
        text = f"convention: cannot tell apart: {'; '.join(close)}; use more rows, or data that is less symmetric"
        return None, [*table, Finding("FAILED", text)]
    misfit = _misfit(best.wrap(field), batch, float(baseline))
    if best is not READINGS[0]:
        text = f"convention: the field fits as {best.name!r}; use {best.code}"
        caution = f" (poorly: {misfit})" if misfit else ""
        return best.name, [*table, Finding("FAILED", text + caution, best.code)]
    if misfit:
        text = f"convention: {misfit}; is the field guided, badly trained or of a convention not listed?"
        return None, [*table, Finding("FAILED", text)]
    return best.name, [*table, Finding("ok", "convention: time 0 is data, 1 is noise, velocity is noise - data")]


def _misfit(field: Field, batch: Batch, baseline: float) -> str | None:
    """Where the velocity is far from what a least-squares fit would be, or None.

    A conditional mean v is orthogonal to its error, ``E<v, target - v> = 0``, at every time.
    """
    velocity = _velocity(field, batch)
    products = _row_means(velocity * (batch.target - velocity))
    sizes = _row_means(velocity.square())
    low, high = TIME_RANGE
    third = (high - low) / 3
    for start in (low, low + third, low + 2 * third):
        chosen = (batch.t >= start) & (batch.t <= start + third)
        product, size = products[chosen], float(sizes[chosen].mean())
        excess = float(product.mean())
        noise = 3 * float(product.std()) / len(product) ** 0.5
        if abs(excess) > max(noise, 0.25 * size, 0.02 * baseline):
            times = f"{start:.2f} to {start + third:.2f}"
            return f"the velocity fits better multiplied by {1 + excess / size:.2f} at times {times}"
    return None


def _velocity(field: Field, batch: Batch) -> Tensor:
    """The field at all points, ``[rows, ...]`` in the dtype of the state; NaN if it raises."""
    parts = []
    for start in range(0, len(batch.x), CHUNK):
        try:
            parts.append(_call(field, _rows(batch, start, start + CHUNK)).to(batch.x.dtype))
        except Exception:
            # A wrong reading may hand over times that the field refuses; that rules the reading out.
            return torch.full_like(batch.x, torch.nan)
    return torch.cat(parts)


def _call(field: Field, batch: Batch) -> Tensor:
    return field(batch.x, batch.t, **batch.condition)


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    """Copies of some rows, so that a field that works in place does not change the batch."""
    index = torch.arange(start, min(stop, len(batch.x)), device=batch.x.device)
    return Batch(batch.x[index], batch.t[index], select_rows(batch.condition, index), batch.target[index])


def _row_means(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def _clearly_less(losses: Tensor, others: Tensor) -> bool:
    """Whether a mean loss is less by more than 1 % of the baseline and three standard errors of the difference."""
    difference = others - losses
    error = difference.std() / len(difference) ** 0.5
    return bool(difference.mean() > torch.clamp(3 * error, min=0.01))


def _relative(actual: Tensor, expected: Tensor) -> float:
    scale = expected.float().square().mean().sqrt().clamp(min=1e-12)
    return float((actual.float() - expected.float()).square().mean().sqrt() / scale)


def _tolerance(velocity: Tensor) -> float:
    """Rounding that differs with the size of a batch."""
    return 5e-2 if velocity.dtype in (torch.bfloat16, torch.float16) else 1e-3


def _module(field: Any) -> nn.Module | None:
    """The network inside a field, through the wrappers of `mfd_fast.fields`."""
    while not isinstance(field, nn.Module) and hasattr(field, "field"):
        field = field.field
    return field if isinstance(field, nn.Module) else None


def _training_layer(field: Any) -> str | None:
    """The name of a layer that acts differently in training and is in training mode."""
    module = _module(field)
    for layer in [] if module is None else module.modules():
        drops = isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0
        if layer.training and (drops or isinstance(layer, nn.modules.batchnorm._BatchNorm)):
            return type(layer).__name__
    return None
