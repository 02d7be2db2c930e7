"""``bench``: what is timed, the laws of intervals, pairs, and wrong input."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FIELDS = """
from mfd_fast.closed_forms import Gaussian
from mfd_fast.models import build_model

def good():
    return Gaussian([1.0, -0.5], [0.5, 1.5])

def other():
    return Gaussian([0.0, 0.0], [1.0, 1.0])

def unlabelled():
    return lambda x, t: x

def labelled():
    return build_model("mlp", (2,), num_classes=3, width=8, depth=1)
"""
COMMON = ("--data", "points.npz", "--step-size", "0.2", "--rows", "8")


@pytest.fixture(autouse=True)
def _fields(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "bench_fields.py").write_text(FIELDS)
    x = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    np.savez(tmp_path / "points.npz", x=x)
    np.savez(tmp_path / "labelled.npz", x=x, condition=np.arange(50) % 3)
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("bench_fields", None)


def timings(result: Any) -> dict[str, dict[str, float]]:
    """The timings of ``--json`` by name."""
    assert result.code == 0, result.err
    return {timing["name"]: timing for timing in json.loads(result.out)["timings"]}


def test_table(cli: Any) -> None:
    result = cli("bench", "--field", "bench_fields:good", *COMMON)
    assert result.code == 0
    assert "8 rows, logit-normal intervals, Euler 0.2, one field, guidance 1, 1 thread(s)" in result.out
    assert {line.split()[0] for line in result.out.splitlines()[2:]} == {"eager", "torchdiffeq"}


def test_law_of_the_intervals(cli: Any) -> None:
    command = ("bench", "--field", "bench_fields:good", *COMMON, "--json")
    narrow = timings(cli(*command, "--law-std", "0.01"))["eager"]
    wide = timings(cli(*command, "--law", "uniform"))["eager"]
    assert narrow["evaluations"] == 1.0
    assert wide["evaluations"] > 1.5


def test_pair_of_two_networks(cli: Any) -> None:
    command = ("bench", "--field", "bench_fields:good", *COMMON, "--json")
    one, pair = timings(cli(*command)), timings(cli(*command, "--auxiliary", "bench_fields:other"))
    assert pair["eager"]["evaluations"] == 2 * one["eager"]["evaluations"]
    assert 1e-3 < pair["eager"]["error"] < 1


def test_pair_on_one_backbone_with_guidance(cli: Any) -> None:
    command = (
        "bench",
        "--field",
        "bench_fields:labelled",
        "--data",
        "labelled.npz",
        "--rows",
        "4",
        "--step-size",
        "0.5",
    )
    one = timings(cli(*command, "--json"))
    pair = timings(cli(*command, "--json", "--lora-rank", "2", "--guidance-scale", "3"))
    assert set(pair) == {"eager", "compiled", "torchdiffeq"}
    assert pair["eager"]["evaluations"] == 3 * one["eager"]["evaluations"]
    assert pair["compiled"]["error"] == pytest.approx(pair["eager"]["error"], rel=1e-2)


def test_wrong_input(refused: Any) -> None:
    command = ("bench", "--field", "bench_fields:good", *COMMON)
    on_digits = refused("bench", "--field", "bench_fields:unlabelled", "--rows", "4")
    given = "field(x [4, 1, 8, 8] float32, t [4] float32, label [4] int64) raised TypeError: "
    assert f"--field on --data digits: {given}" in on_digits
    assert "--rows must be at least 1, got 0" in refused(*command, "--rows", "0")
    assert "--lora-rank must be at least 1, got 0" in refused(*command, "--lora-rank", "0")
    assert "--auxiliary-weights needs --auxiliary" in refused(*command, "--auxiliary-weights", "a.safetensors")
    assert "needs a field with classes" in refused(*command, "--guidance-scale", "2")
    assert "--lora-rank needs an nn.Module" in refused(*command, "--lora-rank", "2")
