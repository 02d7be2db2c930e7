"""The middle of SANA's feed-forward in one launch: every pixel is read once, activated, convolved and gated.

The formula is that of the definition, `silu_depthwise_gate` in mfd_fast/ops/gated_depthwise.py; all of it in float32.
One program makes some neighbouring pixels of one picture row in some channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_PIXELS = 16
BLOCK_CHANNELS = 64


@triton.jit
def _silu(x: tl.tensor) -> tl.tensor:
    """``x * sigmoid(x)``."""
    return x / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["height", "width"])
def _gated_depthwise_fwd_kernel(
    x_ptr: tl.tensor,  # [batch, height, width, 2 * channels]
    weight_ptr: tl.tensor,  # [2 * channels, 9]
    bias_ptr: tl.tensor,  # [2 * channels]
    out_ptr: tl.tensor,  # [batch, height, width, channels], written
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """PIXELS pixels of one picture row in CHANNELS channels of the output."""
    across = tl.cdiv(width, PIXELS)
    line = tl.program_id(0).to(tl.int64) // across  # picture and row
    row = line % height
    columns = (tl.program_id(0) % across) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    zeros = tl.zeros((PIXELS, CHANNELS), tl.float32)
    value = zeros + tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    gate = zeros + tl.load(bias_ptr + channels + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    # Not unrolled: nine neighbours at once do not fit into the registers.
    for neighbour in range(0, 9):
        down, right = neighbour // 3 - 1, neighbour % 3 - 1
        there, beside = columns + right, row + down + tl.zeros((PIXELS,), tl.int64)
        exists = (there >= 0) & (there < width) & (beside >= 0) & (beside < height)
        mask = exists[:, None] & inside[None, :]
        place = x_ptr + ((line + down) * width + there)[:, None] * (2 * channels) + channel[None, :]
        weight = weight_ptr + channel * 9 + neighbour
        x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        value += _silu(x) * tl.load(weight, mask=inside, other=0.0).to(tl.float32)[None, :]
        x = tl.load(place + channels, mask=mask, other=0.0).to(tl.float32)
        gate += _silu(x) * tl.load(weight + channels * 9, mask=inside, other=0.0).to(tl.float32)[None, :]
    result = value * _silu(gate)
    place = (line * width + columns)[:, None] * channels + channel[None, :]
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=(columns < width)[:, None] & inside[None, :])


def launch_gated_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``[B, H, W, C]`` from x ``[B, H, W, 2C]``, weight ``[2C, 1, 3, 3]`` and bias ``[2C]``, all contiguous.

    float32, bfloat16 or float16. Nothing is read back from the device.
    """
    batch, height, width, both = x.shape
    out = torch.empty((batch, height, width, both // 2), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    grid = (batch * height * triton.cdiv(width, BLOCK_PIXELS), triton.cdiv(both // 2, BLOCK_CHANNELS))
    with torch.cuda.device_of(x):
        _gated_depthwise_fwd_kernel[grid](
            *(x, weight, bias, out, height, width, both // 2),
            PIXELS=BLOCK_PIXELS,
            CHANNELS=BLOCK_CHANNELS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out
