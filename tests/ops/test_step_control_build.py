"""The kernels of the step control compile for every supported GPU, within its registers. No GPU is needed."""

import importlib.util
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]

BUILD = "build_step_control.py"
CAPABILITIES = [80, 86, 89, 90, 100, 120]
ONE_LAUNCH = ["64-float32", "64-float64"]
TWO_LAUNCHES = ["100-float32", "32768-float32", "32768-float64"]


def select(built: list[dict[str, Any]], capability: int, case: str) -> list[dict[str, Any]]:
    return [one for one in built if (one["capability"], one["case"]) == (capability, case)]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_launches(built: list[dict[str, Any]], capability: int) -> None:
    control, partial = "_step_control_fwd_kernel", "_step_control_partial_kernel"
    for case in ONE_LAUNCH:
        assert [one["kernel"] for one in select(built, capability, case)] == [control], case
    for case in TWO_LAUNCHES:
        assert sorted(one["kernel"] for one in select(built, capability, case)) == [control, partial], case


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_register_is_spilled(built: list[dict[str, Any]], capability: int) -> None:
    for case in ONE_LAUNCH + TWO_LAUNCHES:
        for one in select(built, capability, case):
            assert (one["stack"], one["local"]) == (0, 0), one


def test_spills_would_be_seen(built: list[dict[str, Any]]) -> None:
    (starved,) = select(built, 120, "starved")
    assert starved["registers"] <= 24
    assert starved["stack"] > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_long_rows_are_loaded_16_bytes_at_a_time(built: list[dict[str, Any]], capability: int) -> None:
    for case, load in (("32768-float32", "ld.global.v4.b32"), ("32768-float64", "ld.global.v2.b64")):
        (partial,) = (one for one in select(built, capability, case) if "partial" in one["kernel"])
        assert set(partial["loads"]) == {load}


def test_places_beyond_two_to_the_31_are_reached(built: list[dict[str, Any]]) -> None:
    """Every offset into memory is computed in 64 bits."""
    for one in built:
        assert one["offsets"], one
        assert set(one["offsets"]) == {"i64"}, one


def test_sums_need_no_atomics(built: list[dict[str, Any]]) -> None:
    assert [one for one in built if one["atomics"]] == []


def test_what_the_interpreter_cannot_show(built: list[dict[str, Any]]) -> None:
    """Settings arrive in double precision; NaN wins a maximum."""
    for one in built:
        expected = ["f64"] * (2 if "partial" in one["kernel"] else 6)
        assert one["float_parameters"] == expected, one
        assert set(one["maxima"]) <= {"max.NaN.f32"}, one
    assert any(one["maxima"] for one in built)
