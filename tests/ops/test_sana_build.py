"""The kernels of SANA compile for every supported GPU, within its registers. No GPU is needed."""

import importlib.util
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
BUILD = "build_sana.py"
CAPABILITIES = [80, 86, 89, 90, 100, 120]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_without_spills(built: list[dict[str, Any]], capability: int) -> None:
    found = [one for one in built if one["capability"] == capability]
    assert sorted((one["case"], one["kernel"]) for one in found) == [
        ("gated_depthwise-bfloat16", "_gated_depthwise_fwd_kernel"),
        ("gated_depthwise-float32", "_gated_depthwise_fwd_kernel"),
        ("linear_attention-bfloat16", "_linear_attention_fwd_kernel"),
        ("linear_attention-float32", "_linear_attention_fwd_kernel"),
    ]
    for one in found:
        assert (one["stack"], one["local"]) == (0, 0), one


def test_shared_memory_suffices(built: list[dict[str, Any]]) -> None:
    """The GPUs with least of it, 8.6, 8.9 and 12.0, give a program 99 KiB."""
    assert all(one["shared"] <= 99 * 1024 for one in built), [one["shared"] for one in built]
    assert all(one["shared"] > 0 for one in built if one["kernel"] == "_linear_attention_fwd_kernel")


def test_bfloat16_products_run_on_tensor_cores(built: list[dict[str, Any]]) -> None:
    for one in built:
        assert bool(one["matrix"]) == (one["case"] == "linear_attention-bfloat16"), one


def test_tokens_and_pixels_are_addressed_in_64_bits(built: list[dict[str, Any]]) -> None:
    """2^31 elements and more; 32 bits only count channels within a pixel."""
    for one in built:
        by_shape: dict[str, list[str]] = {}
        for shape, bits in one["places"]:
            by_shape.setdefault(shape, []).append(bits)
        if one["kernel"] == "_linear_attention_fwd_kernel":
            assert by_shape, one
            assert all(set(bits) == {"i64"} for bits in by_shape.values()), by_shape
        else:
            assert by_shape["16x1"] == ["i64"], "the pixel that is read"
            assert by_shape["16x64"][-1] == "i64", "the pixel that is written"


def test_no_atomics(built: list[dict[str, Any]]) -> None:
    """Equal inputs give equal bits."""
    assert [one for one in built if one["atomics"]] == []
