"""Laws of times and of pairs of times."""

import math
from typing import Any

import pytest
import torch
from torch import Generator

from mfd_fast.intervals import LogitNormal, Ranged, Shifted, TimeLaw, Uniform, make_law, sample_pairs, shift_times
from mfd_fast.step_control import FixedSteps

LAWS: dict[str, TimeLaw] = {
    "uniform": Uniform(),
    "logit-normal": LogitNormal(),
    "logit-normal-low": LogitNormal(-0.4, 1.0),
    "shifted": Shifted(Uniform(), 3.0),
    "ranged": Ranged(LogitNormal(0.5, 0.7), 0.02, 0.98),
}


def _seeded() -> Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", LAWS)
def test_draws(name: str) -> None:
    law = LAWS[name]
    t = law.sample(1000, _seeded())
    assert t.shape == (1000,)
    assert t.dtype == torch.float32
    assert 0 <= float(t.min()) < float(t.max()) <= 1
    assert torch.equal(t, law.sample(1000, _seeded()))
    assert not torch.equal(t, law.sample(1000, torch.Generator().manual_seed(1)))
    assert len(t.unique()) > 990
    assert law.sample(0).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_draws_are_float32_whatever_the_default(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    expected = {name: law.sample(50, _seeded()) for name, law in LAWS.items()}
    pairs = sample_pairs(Uniform(), 50, equal_share=0.5, generator=_seeded())
    torch.set_default_dtype(dtype)
    try:
        found = {name: law.sample(50, _seeded()) for name, law in LAWS.items()}
        again = sample_pairs(Uniform(), 50, equal_share=0.5, generator=_seeded())
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(found[name], expected[name]) for name in LAWS)
    assert all(torch.equal(a, b) for a, b in zip(pairs, again, strict=True))


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("uniform", 0.5, 1 / math.sqrt(12)),
        ("logit-normal", 0.5, 0.20842),
        ("logit-normal-low", 0.41600, 0.20245),
        # With t = S u / (1 + (S-1) u): mean S/(S-1)^2 (S - 1 - log S).
        ("shifted", 3 / 4 * (2 - math.log(3)), 0.26663),
    ],
)
def test_moments(name: str, mean: float, std: float) -> None:
    t = LAWS[name].sample(400_000, _seeded()).double()
    assert float(t.mean()) == pytest.approx(mean, abs=0.002)
    assert float(t.std()) == pytest.approx(std, abs=0.002)


def test_logit_normal_is_normal_in_the_logit() -> None:
    logit = torch.logit(LogitNormal(-0.4, 1.5).sample(200_000, _seeded()).double())
    assert float(logit.mean()) == pytest.approx(-0.4, abs=0.02)
    assert float(logit.std()) == pytest.approx(1.5, abs=0.02)


def test_a_shift_moves_towards_noise_and_keeps_the_ends() -> None:
    t = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    torch.testing.assert_close(shift_times(t, 3.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(shift_times(shift_times(t, 3.0), 1 / 3), t)
    assert torch.equal(shift_times(t, 1.0), t)
    assert torch.equal(shift_times(t.view(5, 1), 2.0), shift_times(t, 2.0).view(5, 1))


def test_ranged_maps_the_law() -> None:
    inner = LogitNormal(0.5, 0.7)
    torch.testing.assert_close(
        Ranged(inner, 0.02, 0.98).sample(100, _seeded()), 0.02 + 0.96 * inner.sample(100, _seeded())
    )


@pytest.mark.parametrize("name", LAWS)
def test_pairs_are_ordered_draws_of_the_law(name: str) -> None:
    t, r = sample_pairs(LAWS[name], 5000, generator=_seeded())
    assert t.dtype == r.dtype == torch.float32
    assert bool((t >= r).all())
    assert float((t == r).float().mean()) < 0.01
    generator = _seeded()
    draws = torch.cat([LAWS[name].sample(5000, generator) for _ in range(2)])
    assert torch.equal(torch.cat([t, r]).sort().values, draws.sort().values)


def test_share_of_equal_times() -> None:
    t, r = sample_pairs(Uniform(), 5000, equal_share=1.0, generator=_seeded())
    assert torch.equal(t, r)
    t, r = sample_pairs(Uniform(), 100_000, equal_share=0.25, generator=_seeded())
    assert float((t == r).float().mean()) == pytest.approx(0.25, abs=0.006)
    plain_t, plain_r = sample_pairs(Uniform(), 100_000, equal_share=0.0, generator=_seeded())
    assert torch.equal(t, plain_t), "which rows are equal must not change t"
    assert torch.equal(r[t != r], plain_r[t != r])
    assert float((plain_t == plain_r).float().mean()) < 1e-4


@pytest.mark.parametrize(
    ("law", "step_size", "expected"),
    [
        (Uniform(), 0.02, 17.2),
        (Uniform(), 0.03, 11.6),
        (LogitNormal(-0.4, 1.0), 0.02, 12.2),
        (LogitNormal(-0.4, 1.0), 0.03, 8.3),
    ],
    ids=["uniform-0.02", "uniform-0.03", "logit-normal-0.02", "logit-normal-0.03"],
)
def test_expected_number_of_steps(law: TimeLaw, step_size: float, expected: float) -> None:
    t, r = sample_pairs(law, 200_000, generator=_seeded())
    assert float(FixedSteps(step_size).count(t, r).double().mean()) == pytest.approx(expected, rel=0.02)


def test_make_law() -> None:
    assert make_law("uniform") == Uniform()
    assert make_law("uniform", mean=3.0) == Uniform()
    assert make_law("logit-normal", mean=-0.4, std=2.0) == LogitNormal(-0.4, 2.0)
    assert make_law("uniform", shift=3.0) == Shifted(Uniform(), 3.0)
    assert make_law("uniform", shift=3.0, low=0.1, high=0.9) == Ranged(Shifted(Uniform(), 3.0), 0.1, 0.9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_law("beta"), "law must be one of uniform, logit-normal, got 'beta'"),
        (lambda: LogitNormal(0.0, 0.0), "std must be positive, got 0"),
        (lambda: LogitNormal(0.0, math.nan), "std must be positive, got nan"),
        (lambda: Shifted(Uniform(), 0.0), "shift must be positive, got 0"),
        (lambda: Ranged(Uniform(), 0.5, 0.5), "0 <= low < high <= 1, got low=0.5, high=0.5"),
        (lambda: Ranged(Uniform(), -0.1, 0.5), "0 <= low < high <= 1, got low=-0.1"),
        (lambda: Ranged(Uniform(), 0.0, 1.1), "0 <= low < high <= 1, got low=0.0, high=1.1"),
        (lambda: sample_pairs(Uniform(), 3, equal_share=1.5), r"equal_share must lie in \[0, 1\], got 1.5"),
        (lambda: sample_pairs(Uniform(), 3, equal_share=-0.1), r"equal_share must lie in \[0, 1\], got -0.1"),
    ],
    ids=["name", "std", "std-nan", "shift", "empty-range", "low", "high", "share", "negative-share"],
)
def test_wrong_values(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
