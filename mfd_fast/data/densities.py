"""Two-dimensional laws whose exact velocity is known: nothing has to be trained to have a teacher."""

import math

import torch

from mfd_fast.closed_forms import Gaussian, GaussianMixture
from mfd_fast.data.dataset import Dataset

SEED, HELD_OUT_SEED = 11, 12


def gaussian_2d(num_samples: int = 10_000, num_held_out: int = 2_000) -> Dataset:
    """One Gaussian with a different mean and width in each dimension."""
    return _dataset("gaussian-2d", Gaussian([1.0, -0.5], [0.5, 1.5]), num_samples, num_held_out)


def mixture_2d(num_samples: int = 10_000, num_held_out: int = 2_000) -> Dataset:
    """Eight narrow Gaussians on a circle of radius 2."""
    angles = [2 * math.pi * k / 8 for k in range(8)]
    means = [[2 * math.cos(angle), 2 * math.sin(angle)] for angle in angles]
    return _dataset("mixture-2d", GaussianMixture([1.0] * 8, means, 0.2), num_samples, num_held_out)


def grid_2d(num_samples: int = 10_000, num_held_out: int = 2_000) -> Dataset:
    """Sixteen narrow Gaussians on a 4x4 grid; neighbours weigh 1 and 3 in turn, like the squares of a chessboard."""
    places = [(row, column) for row in range(4) for column in range(4)]
    means = [[row - 1.5, column - 1.5] for row, column in places]
    weights = [1.0 + 2.0 * ((row + column) % 2) for row, column in places]
    return _dataset("grid-2d", GaussianMixture(weights, means, 0.15), num_samples, num_held_out)


def _dataset(name: str, law: Gaussian | GaussianMixture, num_samples: int, num_held_out: int) -> Dataset:
    for argument, number in (("num_samples", num_samples), ("num_held_out", num_held_out)):
        if number < 1:
            raise ValueError(f"{argument}: expected at least 1, got {number}")
    return Dataset(
        name=name,
        x=law.sample(num_samples, torch.Generator().manual_seed(SEED)),
        label=None,
        held_out_x=law.sample(num_held_out, torch.Generator().manual_seed(HELD_OUT_SEED)),
        held_out_label=None,
        teacher=law,
    )
