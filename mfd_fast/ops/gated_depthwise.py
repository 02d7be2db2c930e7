"""The middle of SANA's feed-forward: SiLU, a 3x3 convolution of every channel by itself, and a gate, token-major.

`gated_depthwise_reference` is the definition, with its derivatives. Where none is wanted, as in rollouts, one launch of
a Triton kernel does the same on an NVIDIA GPU, all of it in float32.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mfd_fast.ops import launchers
from mfd_fast.ops.without_gradient import compiled_code_may_run


def silu_depthwise_gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``a * silu(b)`` where ``(a, b)`` are the halves of the channels of ``depthwise3x3(silu(x))``, zero-padded.

    Args:
        x: ``[B, H, W, 2C]``.
        weight: ``[2C, 1, 3, 3]``.
        bias: ``[2C]``.

    Returns:
        ``[B, H, W, C]`` in the dtype of x.
    """
    if compiled_code_may_run(x, weight, bias):
        fast: Tensor = _fast(x, weight, bias)
        return fast
    return gated_depthwise_reference(x, weight, bias)


def gated_depthwise_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition of `silu_depthwise_gate`, in torch."""
    channels_first = functional.silu(x).permute(0, 3, 1, 2)
    mixed = functional.conv2d(channels_first, weight, bias, padding=1, groups=weight.shape[0])
    value, gate = mixed.permute(0, 2, 3, 1).chunk(2, dim=-1)
    return value * functional.silu(gate)


@torch.library.custom_op("mfd_fast::silu_depthwise_gate", mutates_args=())
def _fast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The kernel where it can be used, for tensors without derivatives."""
    kernels = launchers.load("gated_depthwise", x.device)
    if kernels is None:
        return gated_depthwise_reference(x, weight.to(x.dtype), bias.to(x.dtype)).contiguous()
    result: Tensor = kernels.launch_gated_depthwise(x.contiguous(), weight.contiguous(), bias.contiguous())
    return result


@_fast.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
