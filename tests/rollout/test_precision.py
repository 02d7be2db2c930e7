"""Dtypes: the state is float32 or float64 whatever the field computes in."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfd_fast import integrate, mean_velocity, mean_velocity_pair
from mfd_fast.closed_forms import Gaussian
from mfd_fast.data import load_dataset
from mfd_fast.fields import autocast
from mfd_fast.models import build_model
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.models.lora import LoRARoles
from mfd_fast.path import interpolate

LAW = Gaussian([1.3, -0.4], [0.6, 1.7])
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Asked:
    """A field that remembers the dtypes it was given."""

    def __init__(self) -> None:
        self.dtypes: set[tuple[torch.dtype, torch.dtype]] = set()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.dtypes.add((x.dtype, t.dtype))
        return -x


@pytest.mark.parametrize("dtype", DTYPES, ids=_short)
@pytest.mark.parametrize("solver", ["euler", "rk4", "bosh3"])
def test_dtypes_of_state_and_field(dtype: torch.dtype, solver: str) -> None:
    field, state = _Asked(), torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.ones(3, 2, dtype=dtype)
    t = torch.tensor([1.0, 0.5, 0.2])
    assert mean_velocity(field, x, t, 0.2, solver=solver).dtype == state
    assert integrate(field, x, t, 0.2, solver=solver).dtype == state
    assert field.dtypes == {(dtype, state)}


@pytest.mark.parametrize("field_dtype", DTYPES, ids=_short)
def test_field_dtype(field_dtype: torch.dtype) -> None:
    field = _Asked()
    u = mean_velocity(field, torch.ones(3, 2), 1.0, 0.0, field_dtype=field_dtype)
    assert field.dtypes == {(field_dtype, torch.float32)}
    assert u.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=_short)
def test_times_of_any_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1.0, 0.5, 0.25], dtype=dtype)  # these are the same numbers in every dtype
    assert torch.equal(mean_velocity(LAW, x, t, 0.75), mean_velocity(LAW, x, t.float(), 0.75))


def test_low_precision_states_become_float32_at_once() -> None:
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    u = mean_velocity(LAW, x, 0.8, 0.3, step_size=0.001, field_dtype=torch.float32)
    torch.testing.assert_close(u, mean_velocity(LAW, x.float(), 0.8, 0.3, step_size=0.001), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_short)
def test_a_low_precision_module_needs_field_dtype(dtype: torch.dtype) -> None:
    module = build_model("mlp", (2,), width=8, depth=1).to(dtype)
    message = f"x is float32 but the field's weights are {_short(dtype)}: pass field_dtype={dtype} "
    wrapped: list[Any] = [module, LoRARoles(module, rank=1, alpha=1.0).auxiliary]
    for field in wrapped:
        with pytest.raises(TypeError, match=message):
            mean_velocity(field, torch.randn(3, 2), 1.0, 0.0)
    u = mean_velocity(module, torch.randn(3, 2), 1.0, 0.0, field_dtype=dtype)
    assert u.dtype == torch.float32
    assert mean_velocity(module, torch.randn(3, 2).to(dtype), 1.0, 0.0).dtype == torch.float32


def test_a_guided_low_precision_module() -> None:
    module = build_model("mlp", (2,), 3, width=8, depth=1).bfloat16()
    condition = {"label": torch.tensor([0, 1, 2])}
    kwargs: dict[str, Any] = {"condition": condition, "negative_condition": {"label": torch.tensor([3])}}
    x = torch.randn(3, 2)
    with pytest.raises(TypeError, match=r"field_dtype=torch\.bfloat16"):
        mean_velocity(module, x, 1.0, 0.0, guidance_scale=2.0, **kwargs)
    u = mean_velocity(module, x, 1.0, 0.0, guidance_scale=2.0, field_dtype=torch.bfloat16, **kwargs)
    assert u.dtype == torch.float32


def test_an_autocast_module_takes_float32() -> None:
    module = build_model("mlp", (2,), width=8, depth=1)
    nn.init.normal_(module.leave.weight)  # type: ignore[union-attr, arg-type]
    x = torch.randn(3, 2)
    u = mean_velocity(autocast(module, torch.bfloat16), x, 1.0, 0.0)
    assert u.dtype == torch.float32
    exact = mean_velocity(module, x, 1.0, 0.0)
    assert 0 < float((u - exact).norm() / exact.norm()) < 2e-2


@pytest.mark.parametrize("field_dtype", [None, torch.float32], ids=["float64", "float32-field"])
def test_float64(field_dtype: torch.dtype | None) -> None:
    x, t, r = torch.randn(4, 2, dtype=torch.float64), 0.9, 0.2
    u = mean_velocity(LAW, x, t, r, solver="rk4", field_dtype=field_dtype)
    exact = LAW.mean_velocity(x, torch.tensor([t], dtype=torch.float64), torch.tensor([r], dtype=torch.float64))
    error = float((u - exact).abs().max())
    assert u.dtype == torch.float64
    assert error < (1e-6 if field_dtype is None else 1e-5)
    assert field_dtype is None or error > 1e-9


def test_small_steps_in_float32_keep_their_accuracy() -> None:
    """G3: the mean of the velocities against the difference of the ends, and both against float64."""
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    t, r = torch.rand(2, 64, generator=torch.Generator().manual_seed(1))
    r = torch.where((t - r).abs() < 0.1, t - 0.1 * torch.sign(t - 0.5), r)
    u, end = (function(LAW, x, t, r, step_size=0.001) for function in (mean_velocity, integrate))
    torch.testing.assert_close(u, (x - end) / (t - r)[:, None], rtol=1e-5, atol=1e-5)
    exact = mean_velocity(LAW, x.double(), t.double(), r.double(), step_size=0.001)
    torch.testing.assert_close(u.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_network_does_not_need_a_bfloat16_state(digits_teacher: VelocityNetwork) -> None:
    """G12: with steps of 0.001 a bfloat16 state loses most of its updates, a float32 one keeps them."""
    digits = load_dataset("digits")
    assert digits.label is not None
    rows, t, r, steps = 16, 0.8, 0.3, 500
    noise = torch.randn(rows, *digits.sample_shape, generator=torch.Generator().manual_seed(0))
    x = interpolate(digits.x[:rows], noise, torch.full((rows,), t))
    condition = {"label": digits.label[:rows]}
    low = copy.deepcopy(digits_teacher).to(torch.bfloat16)
    exact = mean_velocity(digits_teacher, x, t, r, step_size=0.001, condition=condition)
    u = mean_velocity(low, x, t, r, step_size=0.001, condition=condition, field_dtype=torch.bfloat16)

    y = x.bfloat16()
    for step in range(steps):
        now = torch.full((rows,), t - step * 0.001)
        y = y - 0.001 * low(y, now, **condition)
    assert y.dtype == torch.bfloat16
    naive = (x - y.float()) / (t - r)

    assert float((exact - u).square().mean().sqrt()) < 2e-2
    assert float((exact - naive).square().mean().sqrt()) > 1e-1


def test_pairs_take_field_dtype_too() -> None:
    teacher, auxiliary = (build_model("mlp", (2,), width=8, depth=1).bfloat16() for _ in range(2))
    with pytest.raises(TypeError, match=r"field_dtype=torch\.bfloat16"):
        mean_velocity_pair(teacher, auxiliary, torch.randn(3, 2), 1.0, 0.0)
    pair = mean_velocity_pair(teacher, auxiliary, torch.randn(3, 2), 1.0, 0.0, field_dtype=torch.bfloat16)
    assert [u.dtype for u in pair] == [torch.float32] * 2
