"""One clear error for each mistake: the argument, what was expected, what came."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast import integrate, mean_velocity, mean_velocity_pair
from mfd_fast.closed_forms import Gaussian

LAW = Gaussian([1.3, -0.4], [0.6, 1.7])
NAN, INF = math.nan, math.inf


class _Ranged:
    time_range = (0.02, 0.98)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return x


def _points(*shape: int) -> Tensor:
    return torch.randn(*shape or (3, 2), generator=torch.Generator().manual_seed(0))


def _with_hole(value: float) -> Tensor:
    x = _points()
    x[1, 0] = value
    return x


GUIDED: dict[str, Any] = {"guidance_scale": 2.0, "negative_condition": {}}
ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "field": ({"field": 3}, TypeError, r"^field must be callable as field\(x, t, \*\*condition\), got int$"),
    "x-list": ({"x": [1.0]}, TypeError, "^x must be a tensor, got list$"),
    "x-int": ({"x": torch.ones(3, 2, dtype=torch.int64)}, TypeError, r"^x must be floating point, got torch\.int64$"),
    "x-complex": ({"x": torch.ones(3, 2) * 1j}, TypeError, r"^x must be floating point, got torch\.complex64$"),
    "x-scalar": ({"x": torch.tensor(1.0)}, ValueError, "^x must have a leading batch dimension, got a 0-dimensional"),
    "x-hollow": ({"x": torch.ones(3, 0)}, ValueError, r"^x must have at least one number in each sample.*\(3, 0\)$"),
    "x-nan": ({"x": _with_hole(NAN)}, ValueError, "^x must be finite, got NaN or infinity in row 1$"),
    "x-inf": ({"x": _with_hole(-INF)}, ValueError, "^x must be finite, got NaN or infinity in row 1$"),
    "t-none": ({"t": None}, TypeError, "^t must be a number or a tensor, got NoneType$"),
    "t-bool": ({"t": True}, TypeError, "^t must be a number or a tensor, got bool$"),
    "r-list": ({"r": [0.0, 0.0, 0.0]}, TypeError, "^r must be a number or a tensor, got list$"),
    "r-mask": ({"r": torch.tensor(True)}, TypeError, r"^r must be a real number or tensor, got torch\.bool$"),
    "t-complex": ({"t": torch.tensor(1j)}, TypeError, r"^t must be a real number or tensor, got torch\.complex64$"),
    "t-rows": (
        {"t": torch.ones(2)},
        ValueError,
        r"^t must be a number, a 0-d tensor or have shape \(3,\), got \(2,\)$",
    ),
    "t-column": ({"t": torch.ones(3, 1)}, ValueError, r"^t must be .* have shape \(3,\), got \(3, 1\)$"),
    "r-one": ({"r": torch.ones(1)}, ValueError, r"^r must be .* have shape \(3,\), got \(1,\)$"),
    "t-device": ({"t": torch.ones(3, device="meta")}, ValueError, r"^t must be on the CPU or .* x \(cpu\), got meta$"),
    "r-device": (
        {"r": torch.tensor(0.0, device="meta")},
        ValueError,
        r"^r must be on the CPU or .* \(cpu\), got meta$",
    ),
    "t-nan": ({"t": NAN}, ValueError, "^t must be finite, got nan in row 0$"),
    "r-inf": ({"r": torch.tensor([0.0, 0.0, -INF])}, ValueError, "^r must be finite, got -inf in row 2$"),
    "t-range": (
        {"field": _Ranged(), "t": torch.tensor([0.5, 1.0, 0.5]), "r": 0.5},
        ValueError,
        r"^t must lie in the field's time_range \[0\.02, 0\.98\], got 1 in row 1$",
    ),
    "r-range": (
        {"field": _Ranged(), "t": 0.5, "r": 0},
        ValueError,
        r"^r must lie .* \[0\.02, 0\.98\], got 0 in row 0$",
    ),
    "step-zero": ({"step_size": 0.0}, ValueError, "^step_size must be finite and greater than 0, got 0"),
    "step-negative": ({"step_size": -0.02}, ValueError, r"^step_size must be finite and greater than 0, got -0\.02$"),
    "step-nan": ({"step_size": NAN}, ValueError, "^step_size must be finite and greater than 0, got nan$"),
    "step-inf": ({"step_size": INF}, ValueError, "^step_size must be finite and greater than 0, got inf$"),
    "step-text": ({"step_size": "0.02"}, TypeError, "^step_size must be a number, got str$"),
    "step-tensor": ({"step_size": torch.tensor(0.1)}, TypeError, "^step_size must be a number, got Tensor$"),
    "step-tiny": (
        {"step_size": 1e-9},
        ValueError,
        r"^step_size=1e-09 is too small: .* need 1e\+09 steps, the limit is",
    ),
    "step-adaptive": ({"solver": "bosh3", "step_size": -1.0}, ValueError, "^step_size must be finite and greater than"),
    "step-tiny-adaptive": ({"solver": "bosh3", "step_size": 1e-9}, ValueError, "^step_size=1e-09 is too small: "),
    "step-and-steps": (
        {"step_size": 0.1, "steps": 3},
        ValueError,
        "^give step_size or steps, not both; got step_size=0.1",
    ),
    "steps-zero": ({"steps": 0}, ValueError, "^steps must be between 1 and 100000, got 0$"),
    "steps-many": ({"steps": 10**6}, ValueError, "^steps must be between 1 and 100000, got 1000000$"),
    "steps-float": ({"steps": 3.0}, TypeError, "^steps must be an int, got float$"),
    "solver": ({"solver": "huen"}, ValueError, r"^solver must be one of euler, .*, got 'huen'; did you mean 'heun'\?$"),
    "solver-list": ({"solver": ["euler"]}, TypeError, "^solver must be the name of a solver, got list$"),
    "step-size-list": ({"step_size": [0.1]}, TypeError, "^step_size must be a number, got list$"),
    "solver-none": ({"solver": None}, TypeError, "^solver must be the name of a solver, got NoneType$"),
    "runner": (
        {"runner": "eagr"},
        ValueError,
        r"^runner must be one of auto, eager, compiled, fused, captured, got 'eagr'; did you mean 'eager'\?$",
    ),
    "runner-none": (
        {"runner": None},
        ValueError,
        "^runner must be one of auto, eager, compiled, fused, captured, got None$",
    ),
    "rtol-fixed": (
        {"rtol": 1e-3},
        ValueError,
        "^rtol and atol need an adaptive solver .* got solver='euler', steps=None$",
    ),
    "atol-steps": (
        {"solver": "bosh3", "steps": 3, "atol": 1e-3},
        ValueError,
        "^rtol and atol need .* got solver='bosh3', steps=3$",
    ),
    "rtol-negative": ({"solver": "bosh3", "rtol": -1e-3}, ValueError, "^rtol must be finite and greater than 0"),
    "atol-zero": ({"solver": "bosh3", "atol": 0.0}, ValueError, "^atol must be finite and greater than 0, got 0"),
    "budget-zero": ({"max_evaluations": 0}, ValueError, "^max_evaluations must be at least 1, got 0$"),
    "budget-float": ({"max_evaluations": 3.5}, TypeError, "^max_evaluations must be an int, got float$"),
    "budget-step": (
        {"solver": "rk4", "max_evaluations": 3},
        ValueError,
        "^max_evaluations must allow one step .* 4 eval",
    ),
    "rows-zero": ({"max_rows": 0}, ValueError, "^max_rows must be at least 1, got 0$"),
    "rows-float": ({"max_rows": 2.0}, TypeError, "^max_rows must be an int, got float$"),
    "rows-guided": ({"max_rows": 1, **GUIDED}, ValueError, "^max_rows must be at least 2, the network rows of one sam"),
    "rows-other-library": (
        {"solver": "torchdiffeq:rk4", "max_rows": 9},
        ValueError,
        "^max_rows is not available",
    ),
    "budget-guided": ({"max_evaluations": 1, **GUIDED}, ValueError, "^max_evaluations must be at least 2, the cost of"),
    "budget-library": (
        {"solver": "torchdiffeq:rk4", "max_evaluations": 9},
        ValueError,
        "^max_evaluations is not available",
    ),
    "steps-library": (
        {"solver": "torchdiffeq:dopri5", "steps": 9},
        ValueError,
        "^steps needs a method with fixed steps",
    ),
    "dtype": ({"field_dtype": torch.int32}, TypeError, r"^field_dtype must be a floating-point .*, got torch\.int32$"),
    "dtype-text": ({"field_dtype": "bfloat16"}, TypeError, "^field_dtype must be a floating-point .*, got 'bfloat16'$"),
    "condition": ({"condition": torch.ones(3)}, TypeError, "^condition must be a mapping .* or None, got Tensor$"),
    "condition-rows": (
        {"condition": {"label": torch.zeros(2)}},
        ValueError,
        r"^condition\['label'\] must have leading dimension 3 \(one row per sample\) or 1 .*, got shape \(2,\)$",
    ),
    "condition-nested": (
        {"condition": {"a": {"b": torch.tensor(1)}}},
        ValueError,
        r"^condition\['a'\]\['b'\] must have",
    ),
    "condition-device": (
        {"condition": {"label": torch.zeros(3, device="meta")}},
        ValueError,
        r"^condition\['label'\] must be on the device of x \(cpu\), got meta$",
    ),
    "condition-list": (
        {"condition": {"texts": [torch.zeros(3)]}},
        TypeError,
        r"^condition\['texts'\] must hold its tensors",
    ),
    "negative": ({"guidance_scale": 2.0, "negative_condition": 3}, TypeError, "^negative_condition must be a mapping"),
    "negative-rows": (
        {"guidance_scale": 2.0, "negative_condition": {"label": torch.zeros(2)}},
        ValueError,
        r"^negative_condition\['label'\] must have leading dimension 3",
    ),
    "negative-missing": (
        {"guidance_scale": 2.0},
        ValueError,
        "^guidance_scale other than 1.0 needs negative_condition",
    ),
    "guidance-text": (
        GUIDED | {"guidance_scale": "2"},
        TypeError,
        "^guidance_scale must be a number or a tensor, got str$",
    ),
    "guidance-none": (
        GUIDED | {"guidance_scale": None},
        TypeError,
        "^guidance_scale must be a number .*, got NoneType$",
    ),
    "guidance-nan": (GUIDED | {"guidance_scale": NAN}, ValueError, r"^guidance_scale must be finite, got \[nan\]$"),
    "guidance-rows": (
        GUIDED | {"guidance_scale": torch.ones(2)},
        ValueError,
        r"^guidance_scale must be a number or have shape \(3,\), got shape \(2,\)$",
    ),
}


@pytest.mark.parametrize("function", [mean_velocity, integrate])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str, function: Any) -> None:
    changes, error, message = ARGUMENTS[case]
    with pytest.raises(error, match=message):
        function(**{"field": LAW, "x": _points(), "t": 1.0, "r": 0.0} | changes)


@pytest.mark.parametrize("case", [case for case, (changes, _, _) in ARGUMENTS.items() if "field" not in changes])
def test_arguments_of_a_pair(case: str) -> None:
    changes, error, message = ARGUMENTS[case]
    with pytest.raises(error, match=message):
        mean_velocity_pair(**{"teacher": LAW, "auxiliary": LAW, "x": _points(), "t": 1.0, "r": 0.0} | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": None}, TypeError, "^teacher must be callable"),
        (
            {"teacher": _Ranged},
            TypeError,
            "^teacher must be callable as .*, got the class _Ranged, not an object of it$",
        ),
        ({"auxiliary": None}, TypeError, "^auxiliary must be callable"),
        ({"auxiliary": _Ranged()}, ValueError, "^t must lie in the field's time_range"),
        ({"auxiliary_solver": "rk5"}, ValueError, r"^solver must be one of .*, got 'rk5'; did you mean 'rk4'\?$"),
        ({"auxiliary_step_size": 0}, ValueError, "^step_size must be finite and greater than 0, got 0$"),
        ({"auxiliary_solver": "rk4", "rtol": 1e-3}, ValueError, "^rtol and atol need an adaptive solver"),
    ],
    ids=["teacher", "class", "auxiliary", "range", "solver", "step-size", "rtol"],
)
def test_arguments_that_only_a_pair_has(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mean_velocity_pair(**{"teacher": LAW, "auxiliary": LAW, "x": _points(), "t": 1.0, "r": 0.0} | changes)


FIELDS: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "none": (lambda x, t: None, TypeError, r"^field must return a tensor of shape \(\d, 2\), got NoneType$"),
    "tuple": (lambda x, t: (x, t), TypeError, r"^field must return a tensor of shape \(\d, 2\), got tuple$"),
    "float": (lambda x, t: 0.0, TypeError, r"^field must return a tensor of shape \(\d, 2\), got float$"),
    "column": (
        lambda x, t: x[:, :1],
        ValueError,
        r"^field must return the shape of x, expected \((\d), 2\), got \(\1, 1\)$",
    ),
    "one-row": (
        lambda x, t: x[:1],
        ValueError,
        r"^field must return the shape of x, expected \(\d, 2\), got \(1, 2\)$",
    ),
    "integers": (lambda x, t: x.long(), TypeError, r"^field must return floating point, got torch\.int64$"),
    "scalar": (lambda x, t: x.sum(), ValueError, r"^field must return the shape of x, expected \(\d, 2\), got \(\)$"),
}


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("solver", ["euler", "bosh3", "torchdiffeq:rk4"])
@pytest.mark.parametrize("case", FIELDS)
def test_what_fields_return(case: str, solver: str, guided: bool) -> None:
    field, error, message = FIELDS[case]
    with pytest.raises(error, match=message):
        mean_velocity(field, _points(), 1.0, 0.0, solver=solver, **GUIDED if guided else {})


@pytest.mark.parametrize("case", FIELDS)
def test_what_fields_return_when_both_conditions_need_a_call(case: str) -> None:
    field, error, message = FIELDS[case]
    with pytest.raises(error, match=message):
        mean_velocity(
            lambda x, t, text: field(x, t),
            _points(),
            1.0,
            0.0,
            condition={"text": torch.ones(3, 4)},
            negative_condition={"text": torch.ones(1, 2)},
            guidance_scale=2.0,
        )


def test_a_field_that_fails_late() -> None:
    """A wrong shape that appears when rows have finished is not taken for one row too many."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        return torch.ones(3, 2)

    with pytest.raises(ValueError, match=r"expected \(2, 2\), got \(3, 2\)"):
        mean_velocity(field, _points(), torch.tensor([0.5, 0.5, 0.1]), 0.0, step_size=0.1)


def test_errors_of_the_field_come_through() -> None:
    class OwnError(Exception):
        pass

    def field(x: Tensor, t: Tensor) -> Tensor:
        raise OwnError("mine")

    with pytest.raises(OwnError, match=r"^mine$"):
        mean_velocity(field, _points(), 1.0, 0.0)
    assert torch.is_grad_enabled()


def test_times_at_the_ends_of_a_declared_range_are_inside() -> None:
    """Also as float32, where 0.98 is a little more than 0.98."""
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([0.98, 0.02, 0.5], dtype=dtype)
        assert mean_velocity(_Ranged(), _points(), ends, ends.flip(0)).shape == (3, 2)
    assert mean_velocity(_Ranged(), _points(), 0.98, 0.02).shape == (3, 2)
