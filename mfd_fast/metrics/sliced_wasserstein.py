"""The sliced Wasserstein distance: a distance of laws that needs no features."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mfd_fast.metrics.distances import as_point_sets


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 128, seed: int = 0) -> float:
    """The root mean square, over random directions, of the 2-Wasserstein distance between projections of two sets.

    ``a`` ``[N, ...]`` and ``b`` ``[M, ...]`` are flattened. In one dimension the optimal plan matches equal quantiles,
    which is exact for sets of different sizes too. Source: Rabin et al., "Wasserstein Barycenter and Its Application to
    Texture Mixing", 2011. Raises ValueError for sets that are empty, not finite or of different dimensions.
    """
    if projections < 1:
        raise ValueError(f"projections: expected at least 1, got {projections}")
    points_a, points_b = as_point_sets("a", a, "b", b)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(points_a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = F.normalize(directions, dim=0).to(points_a.device)
    sorted_a = (points_a @ directions).sort(0).values
    sorted_b = (points_b.to(points_a.device) @ directions).sort(0).values
    rows_a, rows_b, share = _matched_quantiles(len(sorted_a), len(sorted_b))
    squares = (sorted_a[rows_a] - sorted_b[rows_b]).square().mean(1)
    return float((squares * share.to(squares.device)).sum().sqrt())


def _matched_quantiles(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of two sorted sets of n and m points that face each other, and the share of the mass of every pair.

    In units of ``1/(n m)`` all levels are whole numbers: nothing is lost to rounding. A level of both sets comes twice;
    the second pair has no mass.
    """
    levels = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).sort().values
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), levels[:-1]])
    return (starts // m).clamp_max(n - 1), (starts // n).clamp_max(m - 1), (levels - starts).double() / (n * m)
