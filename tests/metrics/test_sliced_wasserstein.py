"""The sliced Wasserstein distance where it is known."""

import math

import pytest
import torch
from torch import Tensor

from mfd_fast.metrics import sliced_wasserstein


def _points(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_sets_in_any_order() -> None:
    points = _points(50)
    assert sliced_wasserstein(points, points.flip(0)) == pytest.approx(0.0, abs=1e-12)


def test_shift_in_the_plane() -> None:
    """Every projection is shifted by <direction, shift>, whose mean square is |shift|^2 / 2."""
    shifted = _points(50) + torch.tensor([3.0, 4.0])
    assert sliced_wasserstein(_points(50), shifted, projections=20_000) == pytest.approx(5 / math.sqrt(2), rel=0.01)


def test_one_dimension_is_exact_for_different_sizes() -> None:
    """Two points at 0 and 1 against three at 0, 1 and 5, by hand: thirds and halves meet in sixths."""
    a, b = torch.tensor([[1.0], [0.0]]), torch.tensor([[5.0], [0.0], [1.0]])
    expected = (2 * 0 + 1 * 1 + 1 * 0 + 2 * 16) / 6
    assert sliced_wasserstein(a, b) == pytest.approx(math.sqrt(expected), rel=1e-12)
    assert sliced_wasserstein(b, a) == pytest.approx(math.sqrt(expected), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(7, 5), (6, 4), (1, 9), (8, 8)])
def test_sizes_agree_with_repeated_points(n: int, m: int) -> None:
    a, b = _points(n), _points(m, seed=1)
    repeated = sliced_wasserstein(a.repeat_interleave(m, 0), b.repeat_interleave(n, 0))
    assert sliced_wasserstein(a, b) == pytest.approx(repeated, rel=1e-10)


def test_seed_fixes_the_directions() -> None:
    a, b = _points(40), _points(40, seed=1)
    state = torch.get_rng_state()
    assert sliced_wasserstein(a, b, seed=1) == sliced_wasserstein(a, b, seed=1)
    assert sliced_wasserstein(a, b, seed=1) != sliced_wasserstein(a, b, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_pictures_are_flattened() -> None:
    a, b = torch.zeros(4, 1, 8, 8), torch.ones(4, 1, 8, 8)
    assert sliced_wasserstein(a, b, projections=4096) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    ("a", "b", "projections", "message"),
    [
        (_points(4), _points(4), 0, "projections: expected at least 1"),
        (_points(4), torch.zeros(4, 3), 8, "b: expected 2 values a sample as in a, got 3"),
        (_points(0), _points(4), 8, r"a: expected shape \[N, ...\] with N > 0"),
        (_points(4), _points(4) / 0, 8, "b: expected finite"),
    ],
    ids=["projections", "dimension", "empty", "infinity"],
)
def test_bad_input(a: Tensor, b: Tensor, projections: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(a, b, projections)
