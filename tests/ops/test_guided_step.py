"""The guided solver step and the copying of rows: definitions, kernels in Triton's interpreter, and what is chosen."""

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mfd_fast.ops import copy_rows as copy_op
from mfd_fast.ops import guided_step as op
from mfd_fast.ops import launchers
from mfd_fast.ops.copy_rows import copy_rows, copy_rows_reference
from mfd_fast.ops.guided_step import SlotState, guided_step, guided_step_reference

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class StepCase(NamedTuple):
    """A call of `guided_step`."""

    state: SlotState
    conditional: Tensor
    negative: Tensor | None
    guidance: Tensor | None


def step_case(
    seed: int,
    *,
    rows: int,
    slots: int,
    shape: tuple[int, ...],
    memories: int,
    state: torch.dtype = torch.float32,
    field: torch.dtype = torch.float32,
    guided: int = 0,
) -> StepCase:
    """Some slots are idle, some coefficients zero; what must not be read is NaN. ``guided``: scales, 0 for none."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(state)

    coefficients = normal(3 + 2 * (1 + memories), slots)
    coefficients[op.NUMBERS :] *= torch.rand(2 * (1 + memories), slots, generator=generator) < 0.7
    coefficients[op.ACTIVE] = (torch.rand(slots, generator=generator) < 0.8).to(state)
    coefficients[op.ACTIVE, 0] = 1.0
    coefficients[op.STORE] = torch.randint(-1, memories, (slots,), generator=generator).to(state)
    memory = normal(memories, slots, *shape)
    used = coefficients[op.NUMBERS + 1 : op.NUMBERS + 1 + memories].ne(0) | coefficients[-memories or 99 :].ne(0)
    memory[~used] = math.nan
    # An idle slot holds what its last row left behind, and its network may say anything.
    velocities = [normal(rows, *shape) for _ in range(2)]
    for velocity in velocities:
        velocity[coefficients[op.ACTIVE, :rows] == 0] = math.nan
    conditional, negative = (velocity.to(field) for velocity in velocities)
    slot_state = SlotState(
        normal(slots, *shape), normal(slots, *shape), memory, normal(slots, *shape).to(field), coefficients
    )
    if not guided:
        return StepCase(slot_state, conditional, None, None)
    guidance = normal(guided).expand(rows) if guided == 1 else normal(rows)
    return StepCase(slot_state, conditional, negative, guidance)


class CopyCase(NamedTuple):
    """A call of `copy_rows`."""

    source: Tensor
    source_rows: Tensor
    target: Tensor
    target_rows: Tensor


def copy_case(seed: int, rows: int, shape: tuple[int, ...], source: torch.dtype, target: torch.dtype) -> CopyCase:
    generator = torch.Generator().manual_seed(seed)

    def values(count: int, dtype: torch.dtype) -> Tensor:
        return (100 * torch.randn(count, *shape, generator=generator, dtype=torch.float64)).to(dtype)

    source_rows = torch.randint(0, 9, (rows,), generator=generator)
    target_rows = torch.randperm(rows + 3, generator=generator)[:rows]
    return CopyCase(values(9, source), source_rows, values(rows + 3, target), target_rows)


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
STEP_CASES = {
    "euler": lambda: step_case(0, rows=5, slots=7, shape=(3,), memories=0),
    "ab2-guided-bfloat16": lambda: step_case(1, rows=6, slots=6, shape=(33,), memories=1, field=BF16, guided=6),
    "ab2-one-scale-float16": lambda: step_case(2, rows=4, slots=9, shape=(2, 5), memories=1, field=F16, guided=1),
    "rk4-pieces": lambda: step_case(3, rows=3, slots=4, shape=(1025,), memories=3),
    "rk4-pieces-guided-bfloat16": lambda: step_case(
        4, rows=2, slots=3, shape=(2050,), memories=3, field=BF16, guided=2
    ),
    "scalars": lambda: step_case(5, rows=7, slots=8, shape=(), memories=1, guided=7),
    "float64": lambda: step_case(6, rows=5, slots=5, shape=(17,), memories=2, state=F64, field=F64, guided=5),
    "float64-state-bfloat16": lambda: step_case(7, rows=5, slots=6, shape=(17,), memories=2, state=F64, field=BF16),
    "one-slot": lambda: step_case(9, rows=1, slots=1, shape=(1,), memories=2, guided=1),
    "one-row-of-many": lambda: step_case(8, rows=1, slots=16, shape=(64,), memories=1),
}
IDLE_CASES = {
    "no-rows": lambda: step_case(10, rows=0, slots=3, shape=(4,), memories=1, guided=2),
    "rows-without-width": lambda: step_case(11, rows=2, slots=3, shape=(0,), memories=1),
}
COPY_CASES = {
    "float32-to-bfloat16": lambda: copy_case(0, 5, (33,), F32, BF16),
    "float32-pieces": lambda: copy_case(1, 4, (1030,), F32, F32),
    "bfloat16-to-float64": lambda: copy_case(2, 6, (2, 3), BF16, F64),
    "float64-to-bfloat16": lambda: copy_case(6, 5, (9,), F64, BF16),
    "labels": lambda: copy_case(3, 6, (), torch.int64, torch.int64),
    "bytes": lambda: copy_case(4, 3, (7,), torch.int8, torch.int8),
    "nothing": lambda: copy_case(5, 0, (7,), F32, F32),
    "rows-of-nothing": lambda: copy_case(7, 3, (0,), F32, BF16),
}


def arguments(case: StepCase | CopyCase) -> dict[str, np.ndarray]:
    named = case._asdict()
    if isinstance(case, StepCase):
        named |= named.pop("state")._asdict()
        if case.guidance is not None and case.guidance.stride(0) == 0:
            named["guidance"] = case.guidance[:1]
    tensors = {name: value for name, value in named.items() if value is not None}
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}
    arrays = {name: (value.float() if value.dtype == BF16 else value).numpy() for name, value in tensors.items()}
    return arrays | {"dtypes": np.array(json.dumps(dtypes))}


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[..., dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What the kernels make of every case: ``CASE/RESULT``."""
    cases = STEP_CASES | IDLE_CASES | COPY_CASES
    given = {f"{case}/{name}": value for case in cases for name, value in arguments(cases[case]()).items()}
    return interpret("interpret_rollout.py", given)


def result(interpreted: dict[str, np.ndarray], case: str, name: str, like: Tensor) -> Tensor:
    assert interpreted[f"{case}/intact"]
    return torch.from_numpy(interpreted[f"{case}/{name}"]).to(like.dtype)


def assert_rounds_alike(found: Tensor, expected: Tensor, name: str) -> None:
    """Equal bits, but for bfloat16: the interpreter cuts it off where a GPU rounds (the build test looks at that)."""
    rtol = 2.0**-7 if found.dtype == BF16 else 0.0
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0.0, equal_nan=True, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("case", STEP_CASES)
def test_step_kernel_matches_reference_to_the_bit(interpreted: dict[str, np.ndarray], case: str) -> None:
    given, expected = STEP_CASES[case](), STEP_CASES[case]()
    guided_step_reference(*expected)
    changed = []
    for name, before, after in zip(SlotState._fields, given.state, expected.state, strict=True):
        found = result(interpreted, case, name, after)
        assert_rounds_alike(found, after, name)
        changed += [] if torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0)) else [name]
    assert {"displacement", "inputs"} <= set(changed) <= {"displacement", "inputs", "memory"}


@pytest.mark.parametrize("case", IDLE_CASES)
def test_step_kernel_with_nothing_to_do_changes_nothing(interpreted: dict[str, np.ndarray], case: str) -> None:
    given = IDLE_CASES[case]()
    for name, before in zip(SlotState._fields, given.state, strict=True):
        torch.testing.assert_close(result(interpreted, case, name, before), before, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("case", STEP_CASES)
def test_step_reference_matches_float64_sums_row_by_row(case: str) -> None:
    given, after = STEP_CASES[case](), STEP_CASES[case]()
    guided_step_reference(*after)
    start, displacement, memory, inputs, coefficients = (part.double() for part in given.state)
    for slot in range(len(start)):
        if slot >= len(given.conditional) or coefficients[op.ACTIVE, slot] == 0:
            for before, now in zip(given.state, after.state, strict=True):
                axis = 0 if before.shape[0] == len(start) and before is not given.state.coefficients else 1
                same = before.select(axis, slot), now.select(axis, slot)
                assert torch.equal(same[0].nan_to_num(7.0), same[1].nan_to_num(7.0))
            continue
        velocity = given.conditional[slot].double()
        if given.negative is not None and given.guidance is not None:
            other = given.negative[slot].double()
            velocity = other + given.guidance[slot].double() * (velocity - other)
        terms = [velocity, *memory[:, slot].nan_to_num(0.0)]
        numbers = coefficients[op.NUMBERS :, slot]
        gained = sum(number * term for number, term in zip(numbers[: len(terms)], terms, strict=True))
        ahead = sum(number * term for number, term in zip(numbers[len(terms) :], terms, strict=True))
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(after.state.displacement[slot].double(), displacement[slot] + gained, **close)
        following = (start[slot] + displacement[slot] + gained + ahead).to(inputs.dtype)
        precision = {BF16: 1e-2, F16: 1e-3}.get(given.state.inputs.dtype, 1e-5)
        torch.testing.assert_close(after.state.inputs[slot].double(), following, rtol=precision, atol=precision)
        place = int(coefficients[op.STORE, slot])
        if place >= 0:
            torch.testing.assert_close(after.state.memory[place, slot].double(), velocity, **close)


@pytest.mark.parametrize("case", COPY_CASES)
def test_copy_kernel_matches_reference(interpreted: dict[str, np.ndarray], case: str) -> None:
    expected = COPY_CASES[case]()
    copy_rows_reference(*expected)
    assert_rounds_alike(result(interpreted, case, "target", expected.target), expected.target, "target")
    for i, row in enumerate(expected.target_rows.tolist()):
        source = expected.source[expected.source_rows[i]].to(expected.target.dtype)
        assert torch.equal(expected.target[row], source)


def test_the_input_may_be_the_velocity() -> None:
    """A field that returns its input hands over the memory that is about to be written."""
    given, same = STEP_CASES["euler"](), STEP_CASES["euler"]().state
    given.state.inputs[: len(given.conditional)] = given.conditional
    guided_step(given.state, given.state.inputs[: len(given.conditional)], None, None)
    guided_step(same, given.conditional, None, None)
    on = given.state.coefficients[op.ACTIVE, : len(given.conditional)] != 0
    assert torch.equal(given.state.inputs[: len(on)][on], same.inputs[: len(on)][on])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c._replace(conditional=c.conditional[:, :2]), "slots or more of shape"),
        (lambda c: c._replace(conditional=torch.zeros(99, 3)), "state must have 99 slots or more"),
        (lambda c: c._replace(state=c.state._replace(memory=torch.zeros(1, 7, 3))), "coefficients"),
        (lambda c: c._replace(state=c.state._replace(start=c.state.start.half())), "float32 or float64"),
        (lambda c: c._replace(state=c.state._replace(start=torch.zeros(3, 7).t())), "contiguous"),
        (lambda c: c._replace(negative=c.conditional), "given together"),
        (lambda c: c._replace(negative=c.conditional.half(), guidance=torch.ones(5)), "like conditional"),
        (lambda c: c._replace(negative=c.conditional, guidance=torch.ones(1)), r"guidance must be \[5\]"),
    ],
)
def test_wrong_sizes_are_refused(change: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guided_step(*change(STEP_CASES["euler"]()))  # type: ignore[operator]


def test_copying_other_shapes_is_refused() -> None:
    rows = torch.arange(2)
    with pytest.raises(ValueError, match="rows like source"):
        copy_rows(torch.zeros(3, 4), rows, torch.zeros(3, 5), rows)
    with pytest.raises(ValueError, match="must be"):
        copy_rows(torch.zeros(3, 4), rows, torch.zeros(3, 4), rows[:1])


def test_launchers_get_contiguous_velocities_and_expanded_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Tensor | None, ...]] = []
    monkeypatch.setitem(op._FAST, "cpu", op._run_triton)
    monkeypatch.setattr(
        launchers, "load", lambda name, device: SimpleNamespace(launch_guided_step=lambda *given: calls.append(given))
    )
    given = STEP_CASES["ab2-one-scale-float16"]()
    strided = torch.stack([given.conditional, given.conditional], -1)[..., 0]
    guided_step(given.state, strided, strided, given.guidance)
    (passed,) = calls
    assert all(a is b for a, b in zip(passed[:5], given.state, strict=True))
    for velocity in passed[5:7]:
        assert velocity is not None
        assert velocity.is_contiguous()
        assert torch.equal(velocity, given.conditional)
    assert passed[7] is given.guidance


def test_what_the_copying_kernel_cannot_read_goes_to_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setitem(copy_op._FAST, "cpu", copy_op._run_triton)
    monkeypatch.setattr(
        launchers, "load", lambda name, device: SimpleNamespace(launch_copy_rows=lambda *given: calls.append(given))
    )
    rows = torch.arange(2)
    for source in (torch.ones(3, 2, dtype=torch.bool), torch.ones(3, 2, dtype=torch.complex64)):
        target = torch.zeros_like(source)
        copy_rows(source, rows, target, rows)
        assert torch.equal(target[:2], source[:2])
    target = torch.zeros(2, 3).t()
    copy_rows(torch.ones(3, 2), rows, target, rows)
    assert torch.equal(target[:2], torch.ones(2, 2))
    assert calls == []
    copy_rows(torch.ones(2, 3).t(), rows, torch.zeros(3, 2), rows)
    assert len(calls) == 1


def test_without_kernels_the_definitions_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "load", lambda name, device: None)
    monkeypatch.setitem(op._FAST, "cpu", op._run_triton)
    monkeypatch.setitem(copy_op._FAST, "cpu", copy_op._run_triton)
    given, expected = (STEP_CASES["euler"]() for _ in range(2))
    guided_step(*given)
    guided_step_reference(*expected)
    assert torch.equal(given.state.displacement, expected.state.displacement)
    copied, by_hand = (COPY_CASES["labels"]() for _ in range(2))
    copy_rows(*copied)
    copy_rows_reference(*by_hand)
    assert torch.equal(copied.target, by_hand.target)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("case", STEP_CASES)
def test_step_kernel_matches_reference_on_cuda(case: str) -> None:
    assert launchers.load("guided_step", torch.device("cuda", 0)) is not None
    given, expected = STEP_CASES[case](), STEP_CASES[case]()
    device = SlotState(*(part.cuda() for part in given.state))
    guided_step(device, *(None if part is None else part.cuda() for part in given[1:]))
    guided_step_reference(*expected)
    for ours, theirs in zip(device, expected.state, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("case", COPY_CASES)
def test_copy_kernel_matches_reference_on_cuda(case: str) -> None:
    given, expected = COPY_CASES[case](), COPY_CASES[case]()
    device = CopyCase(*(part.cuda() for part in given))
    copy_rows(*device)
    copy_rows_reference(*expected)
    assert torch.equal(device.target.cpu(), expected.target)
