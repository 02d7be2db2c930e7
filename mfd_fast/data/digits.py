"""Handwritten digits of 8x8 pixels that come with scikit-learn: the dataset that needs no files."""

import torch
from torch import Tensor

from mfd_fast.data.dataset import Dataset

HELD_OUT_SHARE = 0.2
SPLIT_SEED = 20_240_601


def digits() -> Dataset:
    """The 1797 digits of ``sklearn.datasets.load_digits`` in [-1, 1], ``[N, 1, 8, 8]``, with 10 classes.

    One fifth of every class is held out. The split is part of the dataset: the same digits for every seed of a run.
    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    Raises ModuleNotFoundError when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The digits dataset comes with scikit-learn, which is not installed: pip install "mfd_fast[data]"',
            name=error.name,
        ) from error
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).to(torch.float32).div(8).sub(1).unsqueeze(1)
    label = torch.from_numpy(bunch.target).to(torch.int64)
    held_out = _held_out_rows(label)
    return Dataset(
        name="digits",
        x=x[~held_out],
        label=label[~held_out],
        held_out_x=x[held_out],
        held_out_label=label[held_out],
        num_classes=10,
        value_range=(-1.0, 1.0),
    )


def _held_out_rows(label: Tensor) -> Tensor:
    """A mask ``[N]`` that holds `HELD_OUT_SHARE` of every class, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    held_out = torch.zeros(len(label), dtype=torch.bool)
    for value in range(10):
        rows = torch.nonzero(label == value).flatten()
        order = torch.randperm(len(rows), generator=generator)
        held_out[rows[order[: round(HELD_OUT_SHARE * len(rows))]]] = True
    return held_out
