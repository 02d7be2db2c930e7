"""How close generated samples come to the training data: distances near zero are copies."""

import torch
from torch import Tensor

from mfd_fast.metrics.distances import as_point_sets, distance_blocks


def nearest_neighbour_distance(generated: Tensor, training: Tensor) -> Tensor:
    """The Euclidean distance ``[M]`` float64 of every generated sample ``[M, ...]`` to its nearest training sample.

    Compare its median with that of held-out data: a model that copies lies well below. Raises ValueError for sets that
    are empty, not finite or of different dimensions.
    """
    samples, points = as_point_sets("generated", generated, "training", training)
    return torch.cat([block.amin(1) for block in distance_blocks(samples, points)])


def median_nearest_neighbour_distance(generated: Tensor, training: Tensor) -> float:
    """The median of `nearest_neighbour_distance`."""
    return nearest_neighbour_distance(generated, training).median().item()
