"""Products of 8 bits: against the definition, against float64, and what they do with what is not finite."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mfd_fast.ops.quantized_linear import (
    FORMATS,
    PRODUCTS,
    has_product,
    quantize_rows,
    quantized_linear,
    quantized_linear_reference,
)

KINDS = list(FORMATS)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_their_own_scale(kind: str) -> None:
    """Half a step of int8; of e4m3, which has 3 bits behind the point, a sixteenth of each number or of its step."""
    x = numbers(5, 64) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6])[:, None]
    values, scale = quantize_rows(x, kind)
    assert values.dtype == FORMATS[kind].dtype
    torch.testing.assert_close(scale[:, 0], x.abs().amax(1) / FORMATS[kind].largest)
    error = (values.float() * scale - x).abs()
    allowed = 0.5 * scale if kind == "int8" else torch.maximum(x.abs() / 16, scale * 2**-10)
    assert (error <= 1.001 * allowed).all()
    assert torch.equal(quantize_rows(torch.zeros(2, 4), kind)[0].float(), torch.zeros(2, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_definition_and_nearly_the_exact_product(kind: str, bias: bool) -> None:
    x, weight, offset = numbers(3, 20, 64), numbers(48, 64, seed=1), numbers(48, seed=2) if bias else None
    values, scale = quantize_rows(weight, kind)
    ours = quantized_linear(x, values, scale, offset, kind)
    torch.testing.assert_close(ours, quantized_linear_reference(x, values, scale, offset, kind), rtol=1e-6, atol=1e-5)
    exact = functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    # The rounding of e4m3 is a uniform relative one of 2^-4: 2^-4 / sqrt(3) at each number, for both factors.
    allowed = {"int8": 0.012, "fp8": 0.042}[kind]
    assert 0.3 * allowed < (ours.double() - exact).norm() / exact.norm() < allowed


@pytest.mark.parametrize("kind", KINDS)
def test_the_products_of_the_hardware(kind: str) -> None:
    """Those of the CPU, whichever of them are used there: the same functions run on a GPU."""
    rows, _ = quantize_rows(numbers(40, 64), kind)
    weight, _ = quantize_rows(numbers(48, 64, seed=1), kind)
    exact = rows.double() @ weight.double().T
    torch.testing.assert_close(PRODUCTS[kind](rows, weight).double(), exact, rtol=1e-6, atol=1e-6 * exact.abs().max())


def test_where_products_are_used() -> None:
    x, weight = torch.zeros(4, 8), torch.zeros(3, 8)
    assert has_product("int8", x, weight)
    assert not has_product("fp8", x, weight)
    assert not has_product("int8", x.to("meta"), weight.to("meta"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(kind: str, bad: float) -> None:
    x = numbers(3, 16)
    x[1, 5] = bad
    values, scale = quantize_rows(numbers(8, 16, seed=1), kind)
    y = quantized_linear(x, values, scale, None, kind)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_types_are_those_of_a_linear(kind: str) -> None:
    values, scale = quantize_rows(numbers(8, 16), kind)
    for dtype in (torch.float32, torch.bfloat16):
        assert quantized_linear(numbers(2, 16).to(dtype), values, scale, None, kind).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized_linear(numbers(2, 16), values, scale, None, kind).dtype == torch.bfloat16
