"""Attention without softmax, linear in the number of tokens, as SANA uses it (Xie et al. 2024, arXiv 2410.10629).

`linear_attention_reference` is the definition, with its derivatives. Where none is wanted, as in rollouts, one launch
of a Triton kernel does the same on an NVIDIA GPU.
"""

import torch
from torch import Tensor

from mfd_fast.ops import launchers
from mfd_fast.ops.without_gradient import compiled_code_may_run

EPSILON = 1e-15
"""Added to the normaliser, which is zero where no query meets a key."""


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """``o_i = sum_j (relu(q_i) . relu(k_j)) v_j / (sum_j relu(q_i) . relu(k_j) + EPSILON)`` in each head.

    Args:
        q, k, v: ``[B, N, heads * head_dim]``.
        heads: number of heads.

    Returns:
        ``[B, N, heads * head_dim]`` in the dtype of q; sums are in float32 (float64 for float64).
    """
    if compiled_code_may_run(q, k, v):
        fast: Tensor = _fast(q, k, v, heads)
        return fast
    return linear_attention_reference(q, k, v, heads)


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The definition of `relu_linear_attention`, in torch."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q.relu(), k.relu(), v))
    with torch.autocast(q.device.type, enabled=False):  # it would round the sums
        q_wide, k_wide, v_wide = q.to(wide), k.to(wide), v.to(wide)  # [B, heads, N, head_dim]
        weighted = q_wide @ (k_wide.transpose(-1, -2) @ v_wide)
        total = q_wide @ k_wide.sum(2)[..., None]
        return (weighted / (total + EPSILON)).to(q.dtype).transpose(1, 2).flatten(2)


@torch.library.custom_op("mfd_fast::relu_linear_attention", mutates_args=())
def _fast(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The kernel where it can be used, for tensors without derivatives."""
    kernels = launchers.load("linear_attention", q.device)
    if kernels is None or q.shape[-1] // heads not in kernels.HEAD_DIMS or not q.dtype == k.dtype == v.dtype:
        return linear_attention_reference(q, k, v, heads).contiguous()
    q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v))
    result: Tensor = kernels.launch_linear_attention(q, k, v, heads)
    return result


@_fast.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return q.new_empty(q.shape)
