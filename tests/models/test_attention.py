"""Attention backends: the same result in every layout, and reasons when one cannot be used."""

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mfd_fast.models import build_model
from mfd_fast.models.attention import ATTENTION_BACKENDS, attention, why_unavailable

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain attention in the layout ``[B, L, heads, head_dim]`` of flash-attn and xformers."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.fixture
def fake_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for flash_attn and xformers.ops that compute on the CPU."""

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        if attn_bias is not None:
            assert attn_bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            assert attn_bias.stride(-2) % 8 == 0
            assert attn_bias.dtype == q.dtype
        return softmax_attention(q, k, v, attn_bias)

    members: dict[str, dict[str, Any]] = {
        "flash_attn": {"flash_attn_func": softmax_attention},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
    }
    for name, attributes in members.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if neither package were installed."""
    for name in ("flash_attn", "xformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a CUDA device of compute capability 8.0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64) for length in (5, 7, 7)]


@pytest.mark.usefixtures("fake_packages")
@pytest.mark.parametrize("backend", sorted(ATTENTION_BACKENDS))
def test_backends_agree(backend: str) -> None:
    q, k, v = tensors()
    expected = softmax_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(ATTENTION_BACKENDS[backend].run(q, k, v, None), expected)


@pytest.mark.usefixtures("fake_packages")
@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 5, 7), (2, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_xformers_takes_the_masks_of_sdpa(shape: tuple[int, ...], kind: str) -> None:
    q, k, v = tensors()
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = (numbers > 0) | (torch.arange(7) == 0) if kind == "bool" else numbers
    expected = attention(q, k, v, mask=mask)
    torch.testing.assert_close(ATTENTION_BACKENDS["xformers"].run(q, k, v, mask), expected)
    assert not torch.allclose(expected, attention(q, k, v))


@pytest.mark.parametrize("shape", [None, (5, 7), (1, 3, 5, 7), (6, 1, 5, 7)], ids=str)
def test_rows_beyond_what_a_gpu_launches_are_computed_in_parts(
    shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (x.repeat(3, 1, 1, 1).requires_grad_() for x in tensors())
    mask = None if shape is None else torch.randn(shape, dtype=torch.float64)
    expected = attention(q, k, v, mask=mask)
    rows: list[int] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        rows.append(len(q))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    monkeypatch.setitem(ATTENTION_BACKENDS, "sdpa", ATTENTION_BACKENDS["sdpa"]._replace(run=counted))
    monkeypatch.setattr("mfd_fast.models.attention.MOST_ROWS", 4)
    got = attention(q, k, v, mask=mask)
    assert rows == [4, 2]
    torch.testing.assert_close(got, expected)
    for mine, other in zip(
        *(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (got, expected)), strict=True
    ):
        torch.testing.assert_close(mine, other)
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, mask=mask), expected)


@pytest.mark.usefixtures("fake_packages")
def test_flash_attn_refuses_masks() -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match="'flash-attn' takes no mask; use 'sdpa' or 'xformers'"):
        ATTENTION_BACKENDS["flash-attn"].run(q, k, v, torch.ones(5, 7, dtype=torch.bool))


@pytest.mark.usefixtures("fake_packages")
def test_a_chosen_backend_is_used_by_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfd_fast.models.attention.why_unavailable", lambda *_: None)
    for name, options in (("dit", {"width": 32, "depth": 1}), ("unet", {"width": 16, "multipliers": [1, 1]})):
        torch.manual_seed(0)
        models = [build_model(name, (1, 8, 8), None, attention=b, **options) for b in ("sdpa", "flash-attn")]
        with torch.no_grad():
            for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
                mine.add_(0.1 * torch.randn_like(mine))
                other.copy_(mine)
        calls: list[Tensor] = []

        def counted(q: Tensor, k: Tensor, v: Tensor, calls: list[Tensor] = calls) -> Tensor:
            calls.append(q)
            return softmax_attention(q, k, v)

        monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", counted)
        x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
        torch.testing.assert_close(models[1](x, t), models[0](x, t))
        assert calls


@pytest.mark.parametrize("tokens", [(5, 7), (32, 32), (33, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_low_precision_tokens_on_the_cpu(tokens: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8).to(dtype) for length in (tokens[0], tokens[1], tokens[1]))
    exact = functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    out = attention(q, k, v)
    assert out.dtype == dtype
    error = (out.double() - exact).norm() / exact.norm()
    plain = (functional.scaled_dot_product_attention(q, k, v).double() - exact).norm() / exact.norm()
    assert error <= 1.2 * plain


def test_sdpa_is_always_available() -> None:
    assert why_unavailable("sdpa", CPU, torch.float64, 1000) is None


@pytest.mark.usefixtures("no_packages", "fake_cuda")
@pytest.mark.parametrize("backend", ["flash-attn", "xformers"])
def test_a_missing_package_is_named(backend: str) -> None:
    why = why_unavailable(backend, CUDA, torch.float16)
    assert why == f"the package is not installed (pip install {backend})"


@pytest.mark.usefixtures("fake_packages", "fake_cuda")
@pytest.mark.parametrize("backend", ["flash-attn", "xformers"])
@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "why"),
    [
        (CPU, torch.float16, 64, "it needs tensors on a CUDA device, got cpu"),
        (CUDA, torch.float64, 64, "not torch.float64"),
        (CUDA, torch.float16, 264, "a head_dim that is a multiple of 8 up to 256, got 264"),
        (CUDA, torch.bfloat16, 12, "a head_dim that is a multiple of 8 up to 256, got 12"),
    ],
    ids=["cpu", "float64", "wide head", "odd head"],
)
def test_reasons(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, why: str) -> None:
    assert why in (why_unavailable(backend, device, dtype, head_dim) or "")
    assert why_unavailable(backend, CUDA, torch.bfloat16, 64) is None
    assert why_unavailable(backend, CUDA, torch.float16) is None


@pytest.mark.usefixtures("fake_packages", "fake_cuda")
def test_flash_attn_needs_half_precision_and_a_recent_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not torch.float32" in (why_unavailable("flash-attn", CUDA, torch.float32) or "")
    assert why_unavailable("xformers", CUDA, torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability 8.0 or more" in (why_unavailable("flash-attn", CUDA, torch.float16) or "")


@pytest.mark.usefixtures("fake_packages")
def test_no_cuda_device_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_unavailable("xformers", CUDA, torch.float16) == "there is no CUDA device here"


@pytest.mark.usefixtures("fake_packages")
def test_an_unavailable_backend_is_an_error_not_a_fallback() -> None:
    q, k, v = tensors()
    message = r"'flash-attn' cannot be used: it needs tensors on a CUDA device, got cpu; or choose attention='sdpa'"
    with pytest.raises(RuntimeError, match=message):
        attention(q, k, v, backend="flash-attn")
    with pytest.raises(ValueError, match="unknown attention backend 'spda'; did you mean 'sdpa'"):
        attention(q, k, v, backend="spda")
    with pytest.raises(ValueError, match="unknown attention backend 'spda'"):
        why_unavailable("spda", CPU, torch.float32)
