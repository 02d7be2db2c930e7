"""The Fréchet distance where it is known exactly."""

import pytest
import torch
from torch import Tensor

from mfd_fast.metrics import frechet_distance, half_half_distance


def _features(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_sets_are_at_distance_zero() -> None:
    features = _features(200, 16)
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(features, features[torch.randperm(200)]) == pytest.approx(0.0, abs=1e-10)


def test_shifted_copy() -> None:
    features, shift = _features(200, 5), torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0]).double()
    assert frechet_distance(features, features + shift) == pytest.approx(float(shift.square().sum()), rel=1e-10)


def test_scaled_copy() -> None:
    """Scaling by s moves the mean by (s - 1) mu and costs (s - 1)^2 tr S."""
    features = _features(200, 5) + 1
    expected = 4 * features.mean(0).square().sum() + 4 * features.var(0).sum()
    assert frechet_distance(features, 3 * features) == pytest.approx(float(expected), rel=1e-10)


def test_covariances_that_do_not_commute() -> None:
    from scipy.linalg import sqrtm

    a = _features(300, 6) @ _features(6, 6, seed=1)
    b = _features(400, 6, seed=2) @ _features(6, 6, seed=3) + 0.3
    cov_a, cov_b = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + (cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real).trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_covariance_of_low_rank() -> None:
    """Fewer rows than features, and a feature that never changes."""
    features = _features(10, 32)
    features[:, 3] = 0
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(features, features + 2) == pytest.approx(4.0 * 32, rel=1e-10)


def test_gaussians_from_samples() -> None:
    a, b = _features(200_000, 3), 2 * _features(200_000, 3, seed=1) + 1
    assert frechet_distance(a, b) == pytest.approx(3 * (1 + 1), rel=0.02)


def test_float32_features_are_computed_in_float64() -> None:
    features = 1000 + 0.01 * _features(500, 8).float()
    assert frechet_distance(features, features + 1) == pytest.approx(8.0, rel=1e-3)


def test_half_half_of_a_law_shrinks_with_its_size() -> None:
    small, large = half_half_distance(_features(400, 8)), half_half_distance(_features(4000, 8))
    assert small / large == pytest.approx(10, rel=0.4)


def test_half_half_repeats_and_averages_over_splits() -> None:
    features = _features(101, 4)
    state = torch.get_rng_state()
    assert half_half_distance(features, seed=3) == half_half_distance(features, seed=3)
    assert half_half_distance(features, seed=3) != half_half_distance(features, seed=4)
    assert half_half_distance(features, splits=1) != half_half_distance(features, splits=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 4), torch.zeros(9, 4), "features_a: expected at least 2 rows"),
        (torch.zeros(9, 4), torch.zeros(1, 4), "features_b: expected at least 2 rows"),
        (torch.zeros(9, 4), torch.zeros(9, 5), "features_b: expected 4 columns as in features_a, got 5"),
        (torch.zeros(9, 2, 2), torch.zeros(9, 4), r"features_a: expected shape \[N, F\]"),
        (torch.zeros(9, 4), torch.full((9, 4), float("nan")), "features_b: expected finite"),
        (torch.full((9, 4), float("inf")), torch.zeros(9, 4), "features_a: expected finite"),
    ],
    ids=["rows-a", "rows-b", "columns", "pictures", "nan", "infinity"],
)
def test_bad_features(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_bad_halves() -> None:
    with pytest.raises(ValueError, match="at least 4 rows"):
        half_half_distance(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="splits: expected at least 1, got 0"):
        half_half_distance(torch.zeros(8, 4), splits=0)
