"""Euclidean distances between two sets of points, a block of rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ROWS = 1024
EXACT_DIMENSIONS = 256


def distance_blocks(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """The distances of consecutive rows of ``a`` ``[N, F]`` to all of ``b`` ``[M, F]``, as blocks ``[<=1024, M]``.

    Up to `EXACT_DIMENSIONS` computed as differences, so that equal points are at distance zero exactly; in higher
    dimensions as products of matrices, many times faster and off by about 1e-7 for equal points.
    """
    exact = a.shape[1] <= EXACT_DIMENSIONS
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist"
    for start in range(0, len(a), BLOCK_ROWS):
        yield torch.cdist(a[start : start + BLOCK_ROWS], b, compute_mode=mode)


def as_points(argument: str, x: Tensor) -> Tensor:
    """``x`` ``[N, ...]`` as points ``[N, F]`` float64; ValueError for an empty set or values that are not finite."""
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"{argument}: expected shape [N, ...] with N > 0, got {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{argument}: expected finite values, got NaN or infinity")
    return x.detach().flatten(1).double()


def as_point_sets(argument_a: str, a: Tensor, argument_b: str, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of points of the same dimension; ValueError otherwise."""
    points_a, points_b = as_points(argument_a, a), as_points(argument_b, b)
    if points_a.shape[1] != points_b.shape[1]:
        raise ValueError(
            f"{argument_b}: expected {points_a.shape[1]} values a sample as in {argument_a}, got {points_b.shape[1]}"
        )
    return points_a, points_b
