"""The kernels of scheduled rollouts compile for every supported GPU, within its registers. No GPU is needed."""

import importlib.util
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]

BUILD = "build_rollout.py"
CAPABILITIES = [80, 86, 89, 90, 100, 120]
STEPS = ["euler-float32", "ab2-guided-bfloat16", "rk4-guided-bfloat16", "rk4-guided-float64", "ab2-odd-width"]
CASES = [*STEPS, "ab2-scalars", "copy-float32-to-bfloat16", "copy-labels"]


def one(built: list[dict[str, Any]], capability: int, case: str) -> dict[str, Any]:
    (found,) = (part for part in built if (part["capability"], part["case"]) == (capability, case))
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_one_launch_without_spilled_registers(built: list[dict[str, Any]], capability: int) -> None:
    for case in CASES:
        found = one(built, capability, case)
        assert found["kernel"] == ("_copy_rows_kernel" if case.startswith("copy") else "_guided_step_kernel")
        assert (found["stack"], found["local"]) == (0, 0), found
        assert found["registers"] <= 128, found


def test_spills_would_be_seen(built: list[dict[str, Any]]) -> None:
    starved = one(built, 120, "starved")
    assert starved["registers"] <= 24
    assert starved["stack"] > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_memory_is_touched_16_bytes_at_a_time(built: list[dict[str, Any]], capability: int) -> None:
    """All of the rows; what is loaded one by one are the row's few coefficients."""
    for case in ("euler-float32", "ab2-guided-bfloat16", "rk4-guided-bfloat16", "copy-float32-to-bfloat16"):
        assert set(one(built, capability, case)["stores"]) == {"st.global.v4.b32"}, case
    loads = one(built, capability, "ab2-guided-bfloat16")["loads"]
    # Conditional and negative: one load of 8 numbers each; start, displacement and memory: two of 4 each.
    assert loads.count("ld.global.v4.b32") == 8
    assert loads.count("ld.global.b32") == 7


def test_elements_are_addressed_in_64_bits(built: list[dict[str, Any]]) -> None:
    """2^31 elements and more: every offset of a block is 64 bits wide, and 32 bits only place the coefficients."""
    for found in built:
        # Rows of one element have blocks of one, whose addresses are made of the 64-bit row alone.
        assert set(found["offsets"]) == (set() if found["case"] in ("ab2-scalars", "copy-labels") else {"i64"})
        assert all("%slots" in product for product in found["narrow_products"]), found["case"]


def test_what_the_interpreter_cannot_show(built: list[dict[str, Any]]) -> None:
    """Sums are rounded as in torch, not fused; bfloat16 is rounded to nearest, not cut off."""
    for found in built:
        assert found["fused"] == [], found["case"]
        assert bool(found["roundings"]) is (found["case"] in BFLOAT16), found["case"]


BFLOAT16 = ["ab2-guided-bfloat16", "rk4-guided-bfloat16", "ab2-odd-width", "copy-float32-to-bfloat16"]
