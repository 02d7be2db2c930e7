"""Copies are at distance zero; other samples at their distance to the nearest training sample."""

import pytest
import torch

from mfd_fast.metrics import median_nearest_neighbour_distance, nearest_neighbour_distance
from mfd_fast.metrics.distances import BLOCK_ROWS


def test_distances_by_hand() -> None:
    training = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    generated = torch.tensor([[3.0, 4.0], [10.0, 2.0], [0.0, 0.0]])
    assert nearest_neighbour_distance(generated, training).tolist() == [5.0, 2.0, 0.0]
    assert median_nearest_neighbour_distance(generated, training) == 2.0


def test_copies_among_pictures_in_several_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    training = torch.rand(50, 1, 8, 8, generator=generator)
    generated = training.repeat(40, 1, 1, 1)
    generated[-1] += 0.01
    distances = nearest_neighbour_distance(generated, training)
    assert len(distances) == 2000 > BLOCK_ROWS
    assert not distances[:-1].any()
    assert float(distances[-1]) == pytest.approx(0.08, rel=1e-5)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="training: expected 2 values a sample as in generated, got 3"):
        nearest_neighbour_distance(torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="generated: expected finite"):
        nearest_neighbour_distance(torch.full((4, 2), float("nan")), torch.zeros(4, 2))
