"""SANA's transformer blocks (Xie et al. 2024) on the weights of diffusers' modules, token-major from end to end."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfd_fast.models.attention import attention, merge_heads
from mfd_fast.ops.gated_depthwise import silu_depthwise_gate
from mfd_fast.ops.linear_attention import relu_linear_attention

LARGEST_HALF = 65504.0


def sana_block(
    block: Any, h: Tensor, modulation: Tensor, grid: tuple[int, int], key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """One block.

    Args:
        block: a `SanaTransformerBlock`.
        h: ``[B, N, D]`` tokens, row by row of the picture.
        modulation: ``[B, 6, D]`` of the time.
        grid: height and width in tokens.
        key: ``[B, heads, L, head_dim]`` of the text.
        value: ``[B, heads, L, head_dim]`` of the text.
        mask: ``[B, 1, 1, L]`` bool, True = attend, or None.

    Returns:
        ``[B, N, D]``.
    """
    shift_in, scale_in, gate_in, shift_out, scale_out, gate_out = (block.scale_shift_table[None] + modulation).chunk(
        6, dim=1
    )
    normed = (block.norm1(h) * (1 + scale_in) + shift_in).to(h.dtype)
    h = h + gate_in * self_attention(block.attn1, normed)
    h = cross_attention(block.attn2, h, key, value, mask) + h
    normed = block.norm2(h) * (1 + scale_out) + shift_out
    out: Tensor = h + gate_out * feed_forward(block.ff, normed, grid)
    return out


def self_attention(attn: Any, h: Tensor) -> Tensor:
    """Linear attention among the tokens of a picture, ``[B, N, D]``."""
    q, k, v = attn.to_q(h), attn.to_k(h), attn.to_v(h)
    if attn.norm_q is not None:
        q, k = attn.norm_q(q), attn.norm_k(k)
    mixed: Tensor = attn.to_out[1](attn.to_out[0](relu_linear_attention(q, k, v, attn.heads)))
    return mixed.clip(-LARGEST_HALF, LARGEST_HALF) if h.dtype == torch.float16 else mixed


def text_heads(attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[R, heads, L, head_dim]`` of text tokens ``[R, L, D]``; they do not depend on time."""
    key, value = attn.to_k(tokens), attn.to_v(tokens)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    shape = (attn.heads, -1)
    return key.unflatten(-1, shape).transpose(1, 2), value.unflatten(-1, shape).transpose(1, 2)


def cross_attention(attn: Any, h: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of tokens ``[B, N, D]`` to the text."""
    q = attn.to_q(h)
    if attn.norm_q is not None:
        q = attn.norm_q(q)
    mixed = attention(q.unflatten(-1, (attn.heads, -1)).transpose(1, 2), key, value, mask=mask)
    out: Tensor = attn.to_out[1](attn.to_out[0](merge_heads(mixed)))
    return out if attn.rescale_output_factor == 1 else out / float(attn.rescale_output_factor)


def feed_forward(ff: Any, h: Tensor, grid: tuple[int, int]) -> Tensor:
    """The gated feed-forward with a 3x3 convolution inside, ``[B, N, D]``; its 1x1 convolutions are matrix products."""
    wide = pointwise(ff.conv_inverted, h)
    gated = silu_depthwise_gate(wide.unflatten(1, grid), ff.conv_depth.weight, ff.conv_depth.bias)
    return pointwise(ff.conv_point, gated.flatten(1, 2))


def pointwise(conv: Any, h: Tensor) -> Tensor:
    """A 1x1 convolution, or what stands in its place and takes tokens, on ``[B, N, D]``."""
    if isinstance(conv, nn.Conv2d):
        return functional.linear(h, conv.weight.flatten(1), conv.bias)
    out: Tensor = conv(h)
    return out
