"""Linear attention against its formula, token by token, and against diffusers' own."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mfd_fast.ops.linear_attention import relu_linear_attention


def by_formula(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q.relu(), k.relu(), v))
    weights = torch.einsum("bihd,bjhd->bhij", q, k)
    mixed = torch.einsum("bhij,bjhd->bihd", weights, v)
    return (mixed / (weights.sum(-1).transpose(1, 2)[..., None] + 1e-15)).flatten(2)


def tensors(dtype: torch.dtype, batch: int = 2, tokens: int = 7, heads: int = 3, head_dim: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, tokens, heads * head_dim, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_is_the_formula(tokens: int) -> None:
    q, k, v = tensors(torch.float64, tokens=tokens)
    torch.testing.assert_close(relu_linear_attention(q, k, v, 3), by_formula(q, k, v, 3))


def test_a_query_that_meets_no_key_gets_zero() -> None:
    q, k, v = tensors(torch.float32)
    assert torch.equal(relu_linear_attention(-q.abs(), k, v, 3), torch.zeros_like(q))


def test_low_precision_sums_in_float32() -> None:
    q, k, v = tensors(torch.bfloat16, tokens=2000)
    out = relu_linear_attention(q, k, v, 3)
    assert out.dtype == torch.bfloat16
    exact = by_formula(q.double(), k.double(), v.double(), 3)
    assert (out.double() - exact).norm() < 4e-3 * exact.norm()


def test_is_that_of_diffusers() -> None:
    processors = pytest.importorskip("diffusers.models.attention_processor")
    q, k, v = tensors(torch.float32)
    stub = SimpleNamespace(
        to_q=lambda _: q,
        to_k=lambda _: k,
        to_v=lambda _: v,
        norm_q=None,
        norm_k=None,
        heads=3,
        to_out=[nn.Identity(), nn.Identity()],
    )
    theirs = processors.SanaLinearAttnProcessor2_0()(stub, q)
    torch.testing.assert_close(relu_linear_attention(q, k, v, 3), theirs, rtol=1e-5, atol=1e-6)
