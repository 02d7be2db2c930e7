"""The blocks of the transition model, with the parameter names of the released checkpoints.

Convolutions see frames ``[B * F, C, H, W]``, attention sees rows of tokens ``[B, R, L, C]``. The batch is the first
dimension of whatever reaches a Linear, so that low-rank roles find their rows.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfd_fast.models.attention import attention, merge_heads, split_heads

SMALLEST_NORM = 1e-12


class FrameConv(nn.Conv3d):
    """A Conv3d whose kernel spans one frame, computed as a convolution of pictures (the weight keeps five dimensions).

    Args:
        channels_in, channels_out: channels.
        kernel: side of the kernel.
        stride, padding: as for pictures.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(
            channels_in, channels_out, (1, kernel, kernel), (1, stride, stride), padding=(0, padding, padding)
        )

    def forward(self, input: Tensor) -> Tensor:
        """``[B * F, C, H, W]`` to ``[B * F, C', H', W']``."""
        return functional.conv2d(input, self.weight.squeeze(2), self.bias, self.stride[1:], self.padding[1:])


class FrameUpsample(nn.ConvTranspose3d):
    """Doubles height and width of every frame by a transposed convolution (kernel 4, stride 2, padding 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (1, 4, 4), (1, 2, 2), (0, 1, 1))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``[B * F, C, H, W]`` to ``[B * F, C, 2H, 2W]``."""
        return functional.conv_transpose2d(input, self.weight.squeeze(2), self.bias, stride=2, padding=1)


class ChannelNorm(nn.Module):
    """``x / |x| * sqrt(C) * gain`` over the channels of every place, its norm in at least float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B * F, C, H, W]`` to the same shape."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = wide.square().sum(1, keepdim=True).clamp(min=SMALLEST_NORM**2).rsqrt()
        gain = self.gamma.squeeze(3) * self.gamma.shape[0] ** 0.5
        normed: Tensor = wide * inverse * gain
        return normed.to(x.dtype)


class ConvBlock(nn.Module):
    """Convolution, norm, scale and shift where there are some, SiLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.proj = FrameConv(channels_in, channels_out, 3, padding=1)
        self.norm = ChannelNorm(channels_out)

    def forward(self, x: Tensor, scale_shift: Tensor | None = None) -> Tensor:
        """``[B * F, C, H, W]`` and ``[B, 2 * C']`` (scale, then shift) or None, to ``[B * F, C', H, W]``."""
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            frames = x.shape[0] // scale_shift.shape[0]
            scale, shift = scale_shift.repeat_interleave(frames, 0)[:, :, None, None].chunk(2, dim=1)
            x = x * (scale + 1) + shift
        return functional.silu(x)


class ResnetBlock(nn.Module):
    """Two `ConvBlock` and a skip; time scales and shifts inside the first one, if ``time_features`` are given."""

    def __init__(self, channels_in: int, channels_out: int, time_features: int | None = None) -> None:
        super().__init__()
        self.mlp = None
        if time_features is not None:
            self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_features, 2 * channels_out))
        self.block1 = ConvBlock(channels_in, channels_out)
        self.block2 = ConvBlock(channels_out, channels_out)
        self.res_conv = FrameConv(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``[B * F, C, H, W]`` and the time's features ``[B, time_features]``, to ``[B * F, C', H, W]``."""
        scale_shift = None if self.mlp is None else self.mlp(condition)
        out: Tensor = self.block2(self.block1(x, scale_shift)) + self.res_conv(x)
        return out


class ModulatedAttention(nn.Module):
    """Multi-head attention in the layout the released weights were trained with.

    Its heads are merged WITHOUT the transpose that usually precedes it: the result ``[heads, L, head_dim]`` of a row
    is read as ``[L, heads * head_dim]`` in memory order, so a token's features come from other tokens of one head.
    The weights only make sense together with it.
    """

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, R, L, width]``, attention within each of the R rows, to the same shape."""
        q, k, v = split_heads(self.qkv(tokens).flatten(0, 1), self.heads)
        mixed = attention(q, k, v, backend=self.backend).reshape(tokens.shape)
        projected: Tensor = self.proj(mixed)
        return projected


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same shape."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        return out


class TokenBlock(nn.Module):
    """Attention and MLP, each as ``h <- h + gate * f(norm(h) * (1 + scale) + shift)``, the six of the condition."""

    def __init__(self, width: int, heads: int, condition_features: int, backend: str) -> None:
        super().__init__()
        self.attn = ModulatedAttention(width, heads, backend)
        self.mlp = Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition_features, 6 * width))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """``[B, R, L, width]`` and ``[B, condition_features]``, to ``[B, R, L, width]``."""
        parts = self.adaLN_modulation(condition)[:, None, None].chunk(6, dim=3)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
        tokens = tokens + gate_attn * self.attn(_norm(tokens) * (1 + scale_attn) + shift_attn)
        out: Tensor = tokens + gate_mlp * self.mlp(_norm(tokens) * (1 + scale_mlp) + shift_mlp)
        return out


def _norm(tokens: Tensor) -> Tensor:
    return functional.layer_norm(tokens, tokens.shape[3:], eps=1e-6)


class PlainAttention(nn.Module):
    """Multi-head attention without biases in its projections; scores may get a bias per head and pair of tokens."""

    def __init__(self, width: int, heads: int, head_dim: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.to_qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """``[B, R, L, width]`` and ``[heads, L, L]`` or None, to ``[B, R, L, width]``."""
        q, k, v = split_heads(self.to_qkv(tokens).flatten(0, 1), self.heads)
        mask = None if bias is None else bias[None].to(q.dtype)
        mixed = merge_heads(attention(q, k, v, backend=self.backend, mask=mask))
        out: Tensor = self.to_out(mixed.unflatten(0, tokens.shape[:2]))
        return out


class TokenNorm(nn.Module):
    """Layer norm over channels with a gain and no shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, width, 1, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """``[..., width]`` to the same shape."""
        gain = self.gamma.flatten()
        return functional.layer_norm(tokens, gain.shape, eps=1e-5) * gain


class Wrapped(nn.Module):
    """Holds a module under the name ``fn``, as the released checkpoints nest their modules."""

    def __init__(self, fn: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.fn = fn
        self.norm = norm

    def forward(self, *args: Any) -> Any:
        """What the held module returns."""
        return self.fn(*args)


class AttentionLayer(nn.Module):
    """``x + attention(norm(x))`` over the places of each frame, or over the frames of each place."""

    def __init__(self, width: int, heads: int, head_dim: int, over_frames: bool, backend: str) -> None:
        super().__init__()
        self.over_frames = over_frames
        self.fn = Wrapped(Wrapped(PlainAttention(width, heads, head_dim, backend)), TokenNorm(width))

    def forward(self, x: Tensor, frames: int, bias: Tensor | None = None) -> Tensor:
        """``[B * F, C, H, W]``, F, and ``[heads, F, F]`` or None, to the shape of ``x``."""
        tokens = to_tokens(x, frames)
        assert self.fn.norm is not None
        normed = self.fn.norm(tokens)
        normed = normed.transpose(1, 2) if self.over_frames else normed
        mixed = self.fn.fn(normed, bias)
        mixed = mixed.transpose(1, 2) if self.over_frames else mixed
        return to_frames(tokens + mixed, x.shape[2])


def to_tokens(x: Tensor, frames: int) -> Tensor:
    """``[B * F, C, H, W]`` to ``[B, F, H * W, C]``."""
    return to_sequences(x.flatten(2).transpose(1, 2), frames)


def to_sequences(x: Tensor, frames: int) -> Tensor:
    """``[B * F, ...]`` to ``[B, F, ...]``."""
    sequences: Tensor = x.unflatten(0, (-1, frames))
    return sequences


def to_frames(tokens: Tensor, height: int) -> Tensor:
    """``[B, F, H * W, C]`` to ``[B * F, C, H, W]``."""
    pictures: Tensor = tokens.flatten(0, 1).transpose(1, 2).unflatten(2, (height, -1))
    return pictures
