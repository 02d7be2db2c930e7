"""Read a CIFAR-10 python batch without executing the pickle."""

import io

import numpy as np
import torch
from torch import Tensor

from mfd_fast.data.plain_pickle import read_plain_pickle


def read_pickled_batch(content: bytes, sample_size: int) -> tuple[Tensor, list[int]]:
    """The pixels ``[N, sample_size]`` uint8 and the labels of one pickled CIFAR-10 batch.

    Raises ValueError for a pickle that asks for anything but plain arrays, or that holds no such batch.
    """
    batch = read_plain_pickle(io.BytesIO(content))
    if not isinstance(batch, dict):
        raise ValueError(f"expected a dictionary, got {type(batch).__name__}")
    pixels, labels = batch.get(b"data", batch.get("data")), batch.get(b"labels", batch.get("labels"))
    if not isinstance(pixels, np.ndarray):
        raise ValueError(f"expected a numpy array under 'data', got {type(pixels).__name__}")
    if pixels.dtype != np.uint8:
        raise ValueError(f"expected an array of uint8 under 'data', got {pixels.dtype}")
    if pixels.ndim != 2 or pixels.shape[1] != sample_size:
        raise ValueError(f"expected an array of shape (N, {sample_size}) under 'data', got {pixels.shape}")
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise ValueError("expected a list of whole numbers under 'labels'")
    return torch.from_numpy(pixels.copy()), labels
