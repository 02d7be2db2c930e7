"""The kernel of the fused MLP rollout compiles for every supported GPU, within its registers. No GPU is needed."""

import importlib.util
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
BUILD = "build_mlp_rollout.py"
SWITCHES: dict[str, str] = {}
CAPABILITIES = [80, 86, 89, 90, 100, 120]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_register_is_spilled(built: list[dict[str, Any]], capability: int) -> None:
    (one,) = (one for one in built if one["capability"] == capability and one["case"] == "rollout")
    assert (one["stack"], one["local"]) == (0, 0), one


def test_shared_memory_suffices(built: list[dict[str, Any]]) -> None:
    """The GPUs with least of it, 8.6, 8.9 and 12.0, give a program 99 KiB."""
    assert all(0 < one["shared"] <= 99 * 1024 for one in built), [one["shared"] for one in built]


def test_spills_would_be_seen(built: list[dict[str, Any]]) -> None:
    (starved,) = (one for one in built if one["case"] == "starved")
    assert starved["registers"] <= 32
    assert starved["stack"] > 0


def test_products_are_exact_and_layers_wait_for_each_other(built: list[dict[str, Any]]) -> None:
    for one in built:
        assert (one["tf32"], one["atomics"]) == ([], []), one
        assert len(one["barriers"]) >= 3, one


def test_samples_are_addressed_in_64_bits(built: list[dict[str, Any]]) -> None:
    """2^31 numbers and more: where x is read twice, displacements twice and mean velocities once. The other places lie
    in scratch memory or within one weight, which `check_places` keeps below 2^31.
    """
    for one in built:
        wide = [shape for shape, bits in one["places"] if bits == "i64" and "x" in shape]
        assert sorted(wide) == ["16x1", *["16x32"] * 5], wide
