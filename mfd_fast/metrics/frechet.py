"""The Fréchet distance between two sets of features."""

from collections.abc import Callable

import torch
from torch import Tensor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """The squared 2-Wasserstein distance between the Gaussians fitted to two sets of features ``[N, F]``, ``[M, F]``.

    ::

        |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a^{1/2} S_b S_a^{1/2})^{1/2}

    The last trace is the sum of the singular values of ``S_a^{1/2} S_b^{1/2}``: real for every input, and exact for
    singular covariances too. Float64 throughout. The estimate is biased upwards by about ``1/N + 1/M``: compare
    distances only for equal numbers of rows. Source: Heusel et al., arXiv 1706.08500.

    Raises ValueError for anything but two finite matrices with the same number of columns and at least two rows.
    """
    _check_features("features_a", features_a)
    _check_features("features_b", features_b)
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"features_b: expected {features_a.shape[1]} columns as in features_a, got {features_b.shape[1]}"
        )
    a, b = features_a.detach().double().cpu(), features_b.detach().double().cpu()
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    means = (a.mean(0) - b.mean(0)).square().sum()
    traces = root_a.square().sum() + root_b.square().sum() - 2 * torch.linalg.svdvals(root_a @ root_b).sum()
    return max(0.0, float(means + traces))


def half_half_distance(
    features: Tensor, distance: Callable[[Tensor, Tensor], float] = frechet_distance, splits: int = 5, seed: int = 0
) -> float:
    """The mean ``distance`` between two random halves of ``features`` ``[N, F]``: what equal laws score.

    Raises ValueError for fewer than four rows or ``splits < 1``.
    """
    _check_features("features", features)
    if splits < 1:
        raise ValueError(f"splits: expected at least 1, got {splits}")
    if len(features) < 4:
        raise ValueError(f"features: expected at least 4 rows to halve, got {len(features)}")
    generator = torch.Generator().manual_seed(seed)
    half = len(features) // 2
    distances = []
    for _ in range(splits):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        distances.append(distance(features[order[:half]], features[order[half : 2 * half]]))
    return sum(distances) / splits


def _covariance_root(features: Tensor) -> Tensor:
    """The symmetric square root ``[F, F]`` of the unbiased covariance of ``features``."""
    centred = features - features.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(features) - 1))
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def _check_features(argument: str, features: Tensor) -> None:
    if features.dim() != 2 or features.shape[1] == 0:
        raise ValueError(f"{argument}: expected shape [N, F], got {tuple(features.shape)}")
    if len(features) < 2:
        raise ValueError(f"{argument}: expected at least 2 rows to estimate a covariance, got {len(features)}")
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{argument}: expected finite values, got NaN or infinity")
