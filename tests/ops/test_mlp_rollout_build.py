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
    (one,) = (one for one in built if one["capability"] == capability and not one["starved"])
    assert (one["stack"], one["local"]) == (0, 0), one


def test_spills_would_be_seen(built: list[dict[str, Any]]) -> None:
    (starved,) = (one for one in built if one["starved"])
    assert starved["registers"] <= 32
    assert starved["stack"] > 0


def test_products_are_exact_and_layers_wait_for_each_other(built: list[dict[str, Any]]) -> None:
    for one in built:
        assert (one["tf32"], one["atomics"]) == (0, 0), one
        assert one["barriers"] >= 3, one
