"""Precision and recall of generated samples: how many are realistic, and how much of reality they cover."""

from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast.metrics.distances import as_point_sets, distance_blocks


class PrecisionRecall(NamedTuple):
    """Both in [0, 1]."""

    precision: float
    """The share of generated samples that lie in the manifold of the real ones."""
    recall: float
    """The share of real samples that lie in the manifold of the generated ones."""


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall of ``generated`` ``[M, F]`` against ``real`` ``[N, F]``.

    The manifold of a set is the union of balls around its points, each reaching to the k-th nearest other point of the
    set. Source: Kynkäänniemi et al., arXiv 1904.06991. Raises ValueError for sets that are not finite, do not have
    the same dimension, or have no more than k points.
    """
    points, samples = as_point_sets("real", real, "generated", generated)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    for argument, values in (("real", points), ("generated", samples)):
        if len(values) <= k:
            raise ValueError(f"{argument}: expected more than k={k} samples, got {len(values)}")
    return PrecisionRecall(precision=_covered(samples, points, k), recall=_covered(points, samples, k))


def _covered(points: Tensor, manifold: Tensor, k: int) -> float:
    """The share of ``points`` that lie in the manifold of the second set."""
    # Every point is its own nearest: the k-th other one is at place k + 1.
    radius = torch.cat([block.kthvalue(k + 1, dim=1).values for block in distance_blocks(manifold, manifold)])
    inside = torch.cat([(block <= radius).any(1) for block in distance_blocks(points, manifold)])
    return inside.double().mean().item()
