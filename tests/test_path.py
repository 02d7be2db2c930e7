"""The time convention."""

from typing import Any

import pytest
import torch

from mfd_fast.closed_forms import Gaussian
from mfd_fast.path import conditional_velocity, data_prediction, expand_times, interpolate, noise_prediction

DATA, NOISE = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)


def test_zero_is_data_and_one_is_noise() -> None:
    x = interpolate(DATA, NOISE, T)
    assert torch.equal(x[0], DATA[0])
    assert torch.equal(x[2], NOISE[2])
    assert torch.equal(x[1], 0.75 * DATA[1] + 0.25 * NOISE[1])


def test_velocity_points_to_noise() -> None:
    later, earlier = interpolate(DATA, NOISE, T + 0.5), interpolate(DATA, NOISE, T)
    velocity = conditional_velocity(DATA, NOISE)
    assert torch.equal(velocity, NOISE - DATA)
    torch.testing.assert_close((later - earlier) / 0.5, velocity)


def test_predictions_of_a_conditional_velocity_are_its_ends() -> None:
    x, velocity = interpolate(DATA, NOISE, T), conditional_velocity(DATA, NOISE)
    torch.testing.assert_close(data_prediction(x, T, velocity), DATA)
    torch.testing.assert_close(noise_prediction(x, T, velocity), NOISE)


def test_predictions_of_a_law() -> None:
    law = Gaussian(1.3, 0.6)
    x = interpolate(DATA, NOISE, T)
    torch.testing.assert_close(data_prediction(x, T, law(x, T)), law.data_prediction(x, T))


@pytest.mark.parametrize("t", [0.5, T[:2], T[:, None]], ids=["number", "rows", "column"])
def test_times_of_the_wrong_shape_are_refused(t: Any) -> None:
    with pytest.raises(ValueError, match=r"t must be a tensor of shape \(3,\), a time for each row, got "):
        interpolate(DATA, NOISE, t)


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise must have the shape of data, \(3, 2, 4\), got \(1, 2, 4\)"):
        interpolate(DATA, NOISE[:1], T)


def test_expand_times() -> None:
    assert expand_times(T, DATA).shape == (3, 1, 1)
    assert expand_times(T, T).shape == (3,)
    assert expand_times(torch.tensor(0.5).expand(3), DATA).shape == (3, 1, 1)
