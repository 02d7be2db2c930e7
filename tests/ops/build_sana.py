"""Compile what the kernels of SANA would launch: python build_sana.py OUT, see offline.py."""

import sys
from functools import partial

import torch
from offline import write_builds

from mfd_fast.kernels import gated_depthwise, linear_attention


def launch_attention(dtype: torch.dtype) -> None:
    """Queries, keys and values of SANA 1.6B as slices of one projection."""
    q, k, v = torch.ones(1, 64, 3 * 2240, dtype=dtype).chunk(3, -1)
    linear_attention.launch_linear_attention(q, k, v, 70)


def launch_depthwise(dtype: torch.dtype) -> None:
    """A few rows of a picture, with the channels of SANA 1.6B."""
    shapes = ((1, 2, 32, 11200), (11200, 1, 3, 3), (11200,))
    gated_depthwise.launch_gated_depthwise(*(torch.ones(shape, dtype=dtype) for shape in shapes))


CASES = {
    f"{name}-{dtype}": partial(launch, getattr(torch, dtype))
    for name, launch in (("linear_attention", launch_attention), ("gated_depthwise", launch_depthwise))
    for dtype in ("bfloat16", "float32")
}

if __name__ == "__main__":
    write_builds(sys.argv[1], [linear_attention, gated_depthwise], CASES)
