"""Distances between generated and real samples. Each is a function of tensors that returns numbers."""

from mfd_fast.metrics.frechet import frechet_distance, half_half_distance
from mfd_fast.metrics.nearest_neighbour import median_nearest_neighbour_distance, nearest_neighbour_distance
from mfd_fast.metrics.precision_recall import PrecisionRecall, precision_recall
from mfd_fast.metrics.sliced_wasserstein import sliced_wasserstein

__all__ = [
    "PrecisionRecall",
    "frechet_distance",
    "half_half_distance",
    "median_nearest_neighbour_distance",
    "nearest_neighbour_distance",
    "precision_recall",
    "sliced_wasserstein",
]
