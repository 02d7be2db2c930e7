"""SANA's linear attention in one launch: both sums over the tokens, and the queries against them, for rollouts.

The formula is that of the definition, `relu_linear_attention` in mfd_fast/ops/linear_attention.py. One program does one
head of one picture: it first sums keys times values, then walks over the queries. Sums are float32; for 16-bit inputs
the sum that queries meet is scaled to at most one and split into two 16-bit parts, so that both products run on tensor
cores, nothing is rounded to 16 bits and nothing overflows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

HEAD_DIMS = (16, 32, 64)
BLOCK_TOKENS = 64
BLOCK_TOKENS_WIDE = 32
"""In float32, whose products take more registers."""
EPSILON = tl.constexpr(1e-15)


@triton.jit
def _attend(q: tl.tensor, sums: tl.tensor, low: tl.tensor, LOW_PRECISION: tl.constexpr) -> tl.tensor:
    """``q @ sums`` with the float32 precision of ``sums``, given also as what its 16-bit rounding left over."""
    if LOW_PRECISION:
        result = tl.dot(q, sums.to(q.dtype)) + tl.dot(q, low.to(q.dtype))
    else:
        result = tl.dot(q, sums, input_precision="ieee")
    return result


@triton.jit(do_not_specialize=["n_tokens"])
def _linear_attention_fwd_kernel(
    q_ptr: tl.tensor,  # [batch, n_tokens, heads * HEAD_DIM], as k, v and out; features are contiguous
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,  # written
    n_tokens: tl.tensor,
    heads: tl.tensor,
    q_row: tl.tensor,  # strides of pictures and tokens
    q_token: tl.tensor,
    k_row: tl.tensor,
    k_token: tl.tensor,
    v_row: tl.tensor,
    v_token: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
) -> None:
    """One program for one head of one picture."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // heads, program % heads
    features = tl.arange(0, HEAD_DIM)
    column = head * HEAD_DIM + features
    sums = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)  # [of the key, of the value]
    total = tl.zeros((HEAD_DIM,), tl.float32)
    for first in range(0, n_tokens, BLOCK):
        tokens = first + tl.arange(0, BLOCK).to(tl.int64)
        mask = (tokens < n_tokens)[:, None]
        k = tl.load(k_ptr + row * k_row + tokens[:, None] * k_token + column[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + row * v_row + tokens[:, None] * v_token + column[None, :], mask=mask, other=0.0)
        k = tl.maximum(k.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
        sums += tl.dot(tl.trans(k).to(v.dtype), v, input_precision="ieee")
        total += tl.sum(k, 0)
    largest = tl.max(tl.max(tl.abs(sums), 1), 0)
    scale = tl.where(largest > 0.0, 1.0 / largest, 1.0)
    sums, total = sums * scale, total * scale
    low = sums - sums.to(q_ptr.dtype.element_ty).to(tl.float32)
    for first in range(0, n_tokens, BLOCK):
        tokens = first + tl.arange(0, BLOCK).to(tl.int64)
        mask = (tokens < n_tokens)[:, None]
        q = tl.load(q_ptr + row * q_row + tokens[:, None] * q_token + column[None, :], mask=mask, other=0.0)
        q = tl.maximum(q.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
        normaliser = tl.sum(q * total[None, :], 1) + EPSILON * scale
        mixed = _attend(q.to(q_ptr.dtype.element_ty), sums, low, LOW_PRECISION) / normaliser[:, None]
        place = (row * n_tokens + tokens)[:, None] * (heads * HEAD_DIM) + column[None, :]
        tl.store(out_ptr + place, mixed.to(out_ptr.dtype.element_ty), mask=mask)


def launch_linear_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """``[B, N, heads * head_dim]`` from q, k, v of that shape, whose last dimension is contiguous, in one dtype.

    head_dim is one of `HEAD_DIMS`; float32, bfloat16 or float16. Nothing is read back from the device.
    """
    batch, tokens, width = q.shape
    out = torch.empty((batch, tokens, width), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(q):
        _linear_attention_fwd_kernel[(batch * heads,)](
            *(q, k, v, out, tokens, heads),
            *(stride for part in (q, k, v) for stride in part.stride()[:2]),
            HEAD_DIM=width // heads,
            BLOCK=BLOCK_TOKENS_WIDE if q.dtype == torch.float32 else BLOCK_TOKENS,
            LOW_PRECISION=q.dtype != torch.float32,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=False,
        )
    return out
