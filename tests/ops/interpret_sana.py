"""Run the kernels of SANA on CPU tensors in Triton's interpreter: python interpret_sana.py IN.npz OUT.npz.

A program of its own because TRITON_INTERPRET must be set before Triton is imported. IN holds ``CASE/ARGUMENT`` float32
arrays and ``CASE/settings`` as JSON; OUT gets ``CASE``. Outputs lie inside larger buffers that are NaN, and inputs are
surrounded by NaN; ``CASE/intact`` says whether what surrounds the output still is.
"""

import json
import math
import sys

import numpy as np
import torch
from torch import Tensor

from mfd_fast.kernels.gated_depthwise import launch_gated_depthwise
from mfd_fast.kernels.linear_attention import launch_linear_attention

MARGIN = 4096
LAUNCH = {"linear_attention": launch_linear_attention, "gated_depthwise": launch_gated_depthwise}
allocated: list[tuple[Tensor, int]] = []


def surrounded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A buffer full of NaN and a tensor in the middle of it."""
    count = math.prod(shape)
    buffer = torch.full((count + 2 * MARGIN,), math.nan, dtype=dtype)
    return buffer, buffer[MARGIN : MARGIN + count].view(shape)


def unwritten(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    buffer, tensor = surrounded(shape, dtype)
    allocated.append((buffer, tensor.numel()))
    return tensor


def main(source: str, target: str) -> None:
    given = np.load(source, allow_pickle=False)
    results = {}
    torch.empty = unwritten
    for case in sorted({name.split("/")[0] for name in given}):
        settings = json.loads(str(given[f"{case}/settings"]))
        dtype, kernel = getattr(torch, settings.pop("dtype")), settings.pop("kernel")
        tensors = []
        for name in settings.pop("arguments"):
            values = torch.from_numpy(given[f"{case}/{name}"])
            tensors.append(surrounded(tuple(values.shape), dtype)[1].copy_(values))
        if settings.pop("interleaved", False):  # as slices of one projection
            tensors = list(torch.cat(tensors, -1).chunk(3, -1))
        allocated.clear()
        results[case] = LAUNCH[kernel](*tensors, **settings).float().numpy()
        buffer, count = allocated[0]
        around = torch.cat([buffer[:MARGIN], buffer[MARGIN + count :]])
        results[f"{case}/intact"] = np.array(bool(around.isnan().all()))
    np.savez(target, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
