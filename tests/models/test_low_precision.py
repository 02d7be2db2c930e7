"""Copies of networks in 8 bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mfd_fast import mean_velocity
from mfd_fast.estimate.network import SANA_LOW_BYTES
from mfd_fast.models import build_model
from mfd_fast.models.low_precision import QuantizedLinear, low_precision_bytes, low_precision_copy, products_of
from mfd_fast.models.sana import SanaNetwork
from mfd_fast.rollout.compiled import compiled_field

KINDS = {"int8": 0.05, "fp8": 0.15}


def quantized(module: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: part for name, part in module.named_modules() if isinstance(part, QuantizedLinear)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sana_in_8_bits(make_sana: Callable[..., Any], sana_batch: Any, kind: str) -> None:
    network, batch = SanaNetwork(make_sana()), sana_batch(3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    low = low_precision_copy(network, kind)
    parts = quantized(low)
    per_block = {name.partition("transformer_blocks.0.")[2] for name in parts if "transformer_blocks.0." in name}
    assert {"attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.conv_inverted", "ff.conv_point"} <= per_block
    assert len(parts) == 2 * 10
    assert all("transformer_blocks" in name for name in parts)
    kept = dict(low.named_parameters())
    for name, value in network.named_parameters():  # all others are the same memory
        assert name not in kept or kept[name].data_ptr() == value.data_ptr()
    with torch.no_grad():
        exact, ours = (field(batch.x, batch.t, **batch.condition) for field in (network, low))
    assert 0 < (ours - exact).norm() < KINDS[kind] * exact.norm()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_network_with_rounded_weights_where_inputs_are_exact(kind: str) -> None:
    """Inputs that 8 bits hold exactly: only the weights' rounding is left, which merging back reproduces."""
    linear = nn.Sequential(nn.Linear(32, 16)).requires_grad_(False)
    low: Any = low_precision_copy(linear, kind)
    rounded = low[0].values.float() * low[0].scale
    x = torch.randint(-4, 5, (6, 32), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = {"int8": 127.0, "fp8": 7.0}[kind]  # int8 steps of 1, e4m3 steps of a power of two
    expected = nn.functional.linear(x, rounded, linear[0].bias)
    torch.testing.assert_close(low(x), expected, rtol=1e-5, atol=1e-4)


def test_compiled_copies_know_it() -> None:
    network = low_precision_copy(build_model("dit", (1, 8, 8), width=32, depth=1, heads=2), "int8")
    x, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.7)
    with torch.no_grad():
        torch.testing.assert_close(compiled_field(network)(x, t), network(x, t), rtol=1e-4, atol=1e-4)


def test_what_is_counted(make_sana: Callable[..., Any]) -> None:
    network = SanaNetwork(make_sana())
    parts = quantized(low_precision_copy(network, "fp8")).values()
    sizes = sum(part.values.nbytes + part.scale.nbytes for part in parts)
    assert low_precision_bytes(products_of(network)) == sizes


def test_most_weights_of_the_real_sana() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        network = SanaNetwork(diffusers.SanaTransformer2DModel())
    assert low_precision_bytes(products_of(network)) == SANA_LOW_BYTES
    weights = sum(part.weight.numel() for part in products_of(network))
    assert 0.96 < weights / sum(value.numel() for value in network.parameters()) < 0.98


def test_text_of_a_rollout(make_sana: Callable[..., Any], sana_batch: Any) -> None:
    """Keys and values of the text are prepared by the copy too."""
    network, batch = SanaNetwork(make_sana()), sana_batch(3)
    low = low_precision_copy(network, "int8")
    arguments = {"condition": batch.condition, "negative_condition": batch.null, "guidance_scale": 4.5}
    exact, ours = (mean_velocity(field, batch.x, batch.t, batch.r, **arguments) for field in (network, low))
    assert 0 < (ours - exact).norm() < 0.1 * exact.norm()


def test_nothing_to_quantise_is_refused() -> None:
    with pytest.raises(ValueError, match="Conv2d has no Linear to compute in int8"):
        low_precision_copy(nn.Conv2d(2, 2, 1), "int8")
