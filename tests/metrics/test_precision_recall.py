"""Precision falls with samples outside the data, recall with parts of the data that are never drawn."""

import pytest
import torch
from torch import Tensor

from mfd_fast.metrics import precision_recall
from mfd_fast.metrics.distances import BLOCK_ROWS


def _points(n: int, seed: int = 0, d: int = 2) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_equal_sets() -> None:
    points = _points(100)
    assert precision_recall(points, points) == (1.0, 1.0)


def test_worked_example_on_a_line() -> None:
    """With k=1 every ball reaches to the nearest neighbour; counted by hand."""
    real = torch.tensor([[0.0], [1.0], [3.0], [5.0]])
    generated = torch.tensor([[1.9], [2.5], [7.5], [9.5]])
    precision, recall = precision_recall(real, generated, k=1)
    # Real radii 1, 1, 2, 2: [-1, 1], [0, 2], [1, 5], [3, 7] cover 1.9 and 2.5.
    assert precision == 0.5
    # Generated radii 0.6, 0.6, 2, 2: [1.3, 2.5], [1.9, 3.1], [5.5, 9.5], [7.5, 11.5] cover 3 alone.
    assert recall == 0.25


def test_same_law() -> None:
    precision, recall = precision_recall(_points(800), _points(800, seed=1))
    assert precision > 0.85
    assert recall > 0.85


def test_far_away() -> None:
    assert precision_recall(_points(100), _points(100, seed=1) + 100) == (0.0, 0.0)


def test_collapse_lowers_recall_and_not_precision() -> None:
    precision, recall = precision_recall(_points(800), 0.05 * _points(800, seed=1))
    assert precision == 1.0
    assert recall < 0.1


def test_scatter_lowers_precision_and_not_recall() -> None:
    precision, recall = precision_recall(_points(800), 5 * _points(800, seed=1))
    assert precision < 0.3
    assert recall > 0.9


@pytest.mark.parametrize("d", [2, 300], ids=["exact", "products"])
def test_more_rows_than_a_block(d: int) -> None:
    real, generated = _points(BLOCK_ROWS + 77, d=d), _points(BLOCK_ROWS + 5, seed=1, d=d) * 1.05
    whole_real = torch.cdist(real.double(), real.double())
    radius = whole_real.sort(1).values[:, 3]
    expected = (torch.cdist(generated.double(), real.double()) <= radius).any(1).double().mean()
    assert precision_recall(real, generated).precision == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("real", "generated", "k", "message"),
    [
        (_points(3), _points(9), 3, "real: expected more than k=3 samples, got 3"),
        (_points(9), _points(3), 3, "generated: expected more than k=3"),
        (_points(9), _points(9), 0, "k: expected at least 1"),
        (_points(9), _points(9, d=3), 3, "generated: expected 2 values a sample"),
        (_points(9) / 0, _points(9), 3, "real: expected finite"),
    ],
    ids=["few-real", "few-generated", "k", "dimension", "infinity"],
)
def test_bad_input(real: Tensor, generated: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        precision_recall(real, generated, k)
