"""The 2-D laws: fixed points, and teachers that lead noise back to them."""

import pytest
import torch

from mfd_fast.data import load_dataset
from mfd_fast.metrics import sliced_wasserstein

NAMES = ["gaussian-2d", "mixture-2d", "grid-2d"]


@pytest.mark.parametrize("name", NAMES)
def test_is_a_fixed_set_of_points(name: str) -> None:
    dataset = load_dataset(name, num_samples=300, num_held_out=50)
    assert (dataset.x.shape, dataset.held_out_x.shape) == ((300, 2), (50, 2))
    assert dataset.num_classes is None
    assert dataset.value_range is None
    assert torch.equal(load_dataset(name, num_samples=300).x, dataset.x)
    assert not torch.equal(dataset.x[:50], dataset.held_out_x)


@pytest.mark.parametrize("name", NAMES)
def test_teacher_leads_noise_to_the_data(name: str) -> None:
    dataset = load_dataset(name, num_samples=2000, num_held_out=2000)
    assert dataset.teacher is not None
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    x, steps = noise, 200
    for index in range(steps):
        x = x - dataset.teacher(x, torch.full((2000,), 1 - index / steps)) / steps
    apart = sliced_wasserstein(dataset.x, dataset.held_out_x)
    assert sliced_wasserstein(x, dataset.held_out_x) < 2 * apart
    assert sliced_wasserstein(noise, dataset.held_out_x) > 3 * apart


def test_grid_alternates_like_a_chessboard() -> None:
    x = load_dataset("grid-2d", num_samples=20_000).x
    cells = (x + 1.5).round().clamp(0, 3).long()
    dark = (cells.sum(1) % 2).double().mean()
    assert float(dark) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("argument", ["num_samples", "num_held_out"])
def test_number_of_points(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}: expected at least 1, got 0"):
        load_dataset("mixture-2d", None, **{argument: 0})
