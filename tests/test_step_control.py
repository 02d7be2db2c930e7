import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mfd_fast import native
from mfd_fast.ops.step_control import advance_reference
from mfd_fast.step_control import MAX_STEPS, AdaptiveSteps, ControlState, FixedSteps
from mfd_fast.types import Status


@pytest.mark.parametrize(
    ("t", "r", "step_size", "expected"),
    [
        pytest.param(0.06, 0.0, 0.02, 3, id="three-exact"),
        pytest.param(0.0, 0.06, 0.02, 3, id="towards-noise"),
        pytest.param(1.0, 0.0, 0.02, 50, id="whole-path"),
        pytest.param(1.0, 0.7, 0.1, 3, id="rounding-up-by-an-ulp"),
        pytest.param(0.0601, 0.0, 0.02, 4, id="a-little-more"),
        pytest.param(1e-7, 0.0, 0.02, 1, id="tiny"),
        pytest.param(0.4, 0.4, 0.02, 0, id="empty"),
        pytest.param(0.5, 0.0, 10.0, 1, id="step-longer-than-interval"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_fixed_count(t: float, r: float, step_size: float, expected: int, dtype: torch.dtype) -> None:
    count = FixedSteps(step_size).count(torch.tensor([t, 0.3], dtype=dtype), torch.tensor([r, 0.3], dtype=dtype))
    assert count.dtype == torch.int64
    assert count.tolist() == [expected, 0]


def test_fixed_defaults_and_given_steps() -> None:
    t, r = torch.tensor([1.0, 0.5, 0.5]), torch.tensor([0.0, 0.51, 0.5])
    assert FixedSteps() == FixedSteps(step_size=0.02)
    assert FixedSteps().count(t, r).tolist() == [50, 1, 0]
    assert FixedSteps(steps=7).count(t, r).tolist() == [7, 7, 0]
    assert FixedSteps().count(t[:0], r[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step_size": 0.1, "steps": 3}, ValueError, "step_size or steps, not both"),
        ({"step_size": 0.0}, ValueError, "step_size must be finite and greater than 0, got 0"),
        ({"step_size": -0.1}, ValueError, "step_size must be"),
        ({"step_size": math.nan}, ValueError, "step_size must be"),
        ({"step_size": math.inf}, ValueError, "step_size must be"),
        ({"step_size": "0.1"}, TypeError, "step_size must be a number, got str"),
        ({"steps": 0}, ValueError, "steps must be between 1 and"),
        ({"steps": MAX_STEPS + 1}, ValueError, "steps must be between 1 and"),
        ({"steps": 2.0}, TypeError, "steps must be an int, got float"),
        ({"steps": True}, TypeError, "steps must be an int, got bool"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_fixed_refuses(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FixedSteps(**arguments)  # type: ignore[arg-type]


def test_fixed_limit() -> None:
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert FixedSteps(1 / MAX_STEPS).count(one, zero).item() == MAX_STEPS
    with pytest.raises(ValueError, match=r"step_size=1e-06 .* 1e\+06 steps, the limit is 100000"):
        FixedSteps(1e-6).count(one, zero)
    with pytest.raises(ValueError, match=r"step_size=0\.02 .* inf steps"):
        FixedSteps().count(one * math.inf, zero)
    with pytest.raises(ValueError, match="t and r must be finite"):
        FixedSteps().count(one * math.nan, zero)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("rtol", -1e-3, ValueError),
        ("atol", 0.0, ValueError),
        ("atol", math.nan, ValueError),
        ("max_step", 0.0, ValueError),
        ("first_step", -0.1, ValueError),
        ("safety", 1.0, ValueError),
        ("min_factor", 1.0, ValueError),
        ("max_factor", 1.0, ValueError),
        ("rtol", "small", TypeError),
    ],
)
def test_adaptive_refuses(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{name} must be"):
        AdaptiveSteps(**{name: value})  # type: ignore[arg-type]


def test_start() -> None:
    t = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.5])
    r = torch.tensor([0.0, 1.0, 0.49, 0.5, 0.55], requires_grad=True)
    state = AdaptiveSteps(first_step=0.05).start(t, r)
    # A row that would (nearly) be finished by its first step takes exactly the gap.
    expected = torch.tensor([-0.05, 0.05, 0.49 - 0.5, 0.0, 0.0])
    expected[2:] = r.detach()[2:] - t[2:]
    assert torch.equal(state.step, expected)
    assert state.status.tolist() == [Status.RUNNING] * 3 + [Status.SUCCESS, Status.RUNNING]
    assert state.previous_error.tolist() == [1.0] * 5
    assert not state.accepted.any()
    assert not state.step.requires_grad
    assert AdaptiveSteps(first_step=0.05, max_step=0.02).start(t, r).step[0].item() == pytest.approx(-0.02)


@dataclass(frozen=True)
class Case:
    """One row with one element: what is proposed and, worked out by hand, what comes of it."""

    e: float
    t: float = 1.0
    r: float = 0.0
    step: float = -0.1
    previous_error: float = 1.0
    max_step: float | None = None
    new_t: float = 1.0
    new_step: float = -0.1
    new_previous_error: float = 1.0
    status: Status = Status.RUNNING
    accepted: bool = False


CASES = {
    # 0.9 * 0.5^(-0.7/3) = 1.05799
    "accepted": Case(e=0.5, new_t=0.9, new_step=-0.105799, new_previous_error=0.5, accepted=True),
    # ... * 0.25^(0.4/3) = 0.87944
    "accepted-with-history": Case(
        e=0.5, previous_error=0.25, new_t=0.9, new_step=-0.087944, new_previous_error=0.5, accepted=True
    ),
    # 0.9 * 8^(-1/3) = 0.45
    "rejected": Case(e=8.0, new_step=-0.045),
    "rejected-far-off": Case(e=1e6, new_step=-0.02),
    "no-error-at-all": Case(e=0.0, new_t=0.9, new_step=-0.5, new_previous_error=1e-4, accepted=True),
    "maximum-step": Case(
        e=0.0, step=-0.02, max_step=0.02, new_t=0.98, new_step=-0.02, new_previous_error=1e-4, accepted=True
    ),
    "next-is-last": Case(e=0.0, t=0.3, new_t=0.2, new_step=-0.2, new_previous_error=1e-4, accepted=True),
    "last-step": Case(
        e=0.0,
        t=0.1,
        new_t=0.0,
        new_step=0.0,
        new_previous_error=1e-4,
        accepted=True,
        status=Status.SUCCESS,
    ),
    "upwards": Case(e=0.5, t=0.0, r=1.0, step=0.1, new_t=0.1, new_step=0.105799, new_previous_error=0.5, accepted=True),
    "nan": Case(e=math.nan, status=Status.NON_FINITE),
    "infinite": Case(e=math.inf, status=Status.NON_FINITE),
    "underflow": Case(e=1e6, step=-1e-17, new_step=-2e-18, status=Status.STEP_SIZE_UNDERFLOW),
}


def propose(case: Case) -> tuple[AdaptiveSteps, ControlState, Tensor, Tensor, Tensor, Tensor]:
    def row(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64)

    state = ControlState(
        row(case.t),
        row(case.step),
        row(case.previous_error),
        torch.tensor([int(Status.RUNNING)]),
        torch.tensor([True]),
    )
    # |x| = 1 < |candidate| = 3: the scale is 0.01 + 0.03.
    x, candidate, error = row(1.0)[:, None], row(-3.0)[:, None], row(0.04 * case.e)[:, None]
    return AdaptiveSteps(max_step=case.max_step), state, row(case.r), x, candidate, error


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("use_core", [True, False], ids=["core", "reference"])
def test_hand_computed(case: Case, use_core: bool) -> None:
    control, *arguments = propose(case)
    decide = control.advance if use_core else lambda *rest: advance_reference(control, *rest)
    after = decide(*arguments, 3)  # type: ignore[arg-type]
    assert after.t.item() == pytest.approx(case.new_t, abs=1e-15)
    assert after.step.item() == pytest.approx(case.new_step, rel=1e-5, abs=1e-20)
    assert after.previous_error.item() == pytest.approx(case.new_previous_error)
    assert Status(after.status.item()) == case.status
    assert after.accepted.item() is case.accepted


@pytest.mark.parametrize("use_core", [True, False], ids=["core", "reference"])
@pytest.mark.parametrize(("shortfall", "is_last"), [(5e-7, True), (2e-6, False)])
def test_a_step_that_nearly_reaches_the_end_does(shortfall: float, is_last: bool, use_core: bool) -> None:
    control, *arguments = propose(Case(e=0.0, t=0.3, max_step=0.2 * (1 - shortfall)))
    decide = control.advance if use_core else lambda *rest: advance_reference(control, *rest)
    after = decide(*arguments, 3)  # type: ignore[arg-type]
    assert (after.step == -after.t).item() is is_last


def test_error_is_the_root_mean_square_of_a_row() -> None:
    # Ratios 0 and sqrt(2): e = 1 exactly on the edge, and 1.01 beyond it.
    control = AdaptiveSteps(rtol=0.0, atol=1.0)
    state = control.start(torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    error = torch.tensor([[0.0, math.sqrt(2) * 0.9999999], [0.0, math.sqrt(2) * 1.01]], dtype=torch.float64)
    x = torch.zeros_like(error)
    assert control.advance(state, torch.zeros_like(state.t), x, x, error, 3).accepted.tolist() == [True, False]


@pytest.mark.parametrize("use_core", [True, False], ids=["core", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["candidate", "error"])
def test_one_element_that_is_not_finite(bad: float, where: str, use_core: bool) -> None:
    control = AdaptiveSteps()
    state = control.start(torch.ones(2), torch.zeros(2))
    tensors = {name: torch.zeros(2, 37) for name in ("x", "candidate", "error")}
    tensors[where][1, 35] = bad
    decide = control.advance if use_core else lambda *rest: advance_reference(control, *rest)
    after = decide(state, torch.zeros(2), *tensors.values(), 3)  # type: ignore[arg-type]
    assert after.status.tolist() == [Status.RUNNING, Status.NON_FINITE]
    assert after.accepted.tolist() == [True, False]
    assert (after.t[1], after.step[1]) == (state.t[1], state.step[1])


def test_finished_rows_are_left_alone() -> None:
    control = AdaptiveSteps()
    state = control.start(torch.ones(5), torch.zeros(5))._replace(
        status=torch.arange(5), accepted=torch.ones(5, dtype=torch.bool)
    )
    zeros = torch.zeros(5, 2)
    after = control.advance(state, torch.zeros(5), zeros, zeros, zeros, 3)
    assert after.accepted.tolist() == [False] * 4 + [True]
    assert after.t[:4].tolist() == [1.0] * 4
    assert after.status.tolist()[:4] == [0, 1, 2, 3]
    assert torch.equal(after.step[:4], state.step[:4])


@pytest.mark.parametrize("use_core", [True, False], ids=["core", "reference"])
def test_a_row_reaches_the_end_exactly(use_core: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not use_core:
        monkeypatch.setattr(native, "core", lambda: None)
    control = AdaptiveSteps(max_step=0.11)
    t, r = torch.tensor([1.0, 0.1, 0.3]), torch.tensor([0.0, 0.83, 0.3])
    state = control.start(t, r)
    travelled = torch.zeros(3)
    zeros = torch.zeros(3, 1)
    for _ in range(50):
        if not (state.status == Status.RUNNING).any():
            break
        assert state.step.abs().max() <= 0.11
        after = control.advance(state, r, zeros, zeros, zeros, 3)
        travelled += torch.where(after.accepted, state.step, 0.0)
        state = after
    assert state.status.tolist() == [Status.SUCCESS] * 3
    assert torch.equal(state.t, r)
    torch.testing.assert_close(travelled, r - t)


def test_gradients_and_odd_layouts_are_accepted() -> None:
    control = AdaptiveSteps()
    state = control.start(torch.ones(3), torch.zeros(3))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    error = 0.01 * x
    expected = control.advance(state, torch.zeros(3), x, 2 * x, error, 3)
    columns = [tensor.t().contiguous().t().requires_grad_() for tensor in (x, 2 * x, error)]
    plain = [tensor.clone().requires_grad_() for tensor in (x, 2 * x, error)]
    for tensors in (columns, plain):
        after = control.advance(state, torch.zeros(3), *tensors, 3)
        assert not any(value.requires_grad for value in after)
        torch.testing.assert_close(after.step, expected.step, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": torch.zeros(3)}, "same number of rows"),
        ({"x": torch.zeros(3, 4)}, "same number of rows"),
        ({"candidate": torch.zeros(2, 5)}, "must have the shape"),
        ({"error": torch.zeros(2)}, "must have the shape"),
        ({"error": torch.zeros(2, 4, dtype=torch.float64)}, "one dtype"),
        ({"error_order": 0}, "error_order must be at least 1"),
    ],
    ids=["r", "x", "candidate", "error", "dtype", "order"],
)
def test_advance_refuses(change: dict[str, object], message: str) -> None:
    control = AdaptiveSteps()
    state = control.start(torch.ones(2), torch.zeros(2))
    arguments: dict[str, object] = {
        "r": torch.zeros(2),
        "x": torch.zeros(2, 4),
        "candidate": torch.zeros(2, 4),
        "error": torch.zeros(2, 4),
        "error_order": 3,
    }
    with pytest.raises(ValueError, match=message):
        control.advance(state, **(arguments | change))  # type: ignore[arg-type]
