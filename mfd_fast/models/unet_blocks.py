"""The parts of the UNet: residual block, attention block, and the stage made of both."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfd_fast.models.attention import attention, merge_heads, split_heads

Resample = Literal["none", "down", "up"]


class StageSettings(NamedTuple):
    """What all stages of a UNet share."""

    condition_width: int
    head_dim: int
    dropout: float
    backend: str


class Stage(nn.Module):
    """A residual block, then attention where asked for.

    ``takes_skip`` says whether its input is the hidden state joined with a skip connection.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        settings: StageSettings,
        *,
        attend: bool = False,
        resample: Resample = "none",
        takes_skip: bool = False,
    ) -> None:
        super().__init__()
        self.takes_skip = takes_skip
        self.residual = ResidualBlock(channels_in, channels_out, settings, resample)
        self.attention = AttentionBlock(channels_out, settings) if attend else nn.Identity()

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """``hidden`` ``[B, channels_in, H, W]``, ``condition`` ``[B, condition_width]``."""
        out: Tensor = self.attention(self.residual(hidden, condition))
        return out


class ResidualBlock(nn.Module):
    """``h + conv(silu(norm(conv(silu(norm(h)))) * (1 + scale) + shift))``; the last convolution begins at zero."""

    def __init__(self, channels_in: int, channels_out: int, settings: StageSettings, resample: Resample) -> None:
        super().__init__()
        self.resample = resample
        self.norm_in = group_norm(channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.modulation = nn.Linear(settings.condition_width, 2 * channels_out)
        self.norm_out = group_norm(channels_out)
        self.dropout = nn.Dropout(settings.dropout)
        self.conv_out = zero_conv(channels_out, channels_out, 3)
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """``hidden`` ``[B, channels_in, H, W]``, ``condition`` ``[B, condition_width]``."""
        inner = self.conv_in(self._resampled(functional.silu(self.norm_in(hidden))))
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        normed = self.norm_out(inner)
        inner = self.conv_out(self.dropout(functional.silu(torch.addcmul(normed + shift, normed, scale))))
        out: Tensor = self.skip(self._resampled(hidden)) + inner
        return out

    def _resampled(self, hidden: Tensor) -> Tensor:
        if self.resample == "down":
            return functional.avg_pool2d(hidden, 2)
        return functional.interpolate(hidden, scale_factor=2.0) if self.resample == "up" else hidden


class AttentionBlock(nn.Module):
    """``h + W attention(norm(h))`` over all pixels; ``W`` begins at zero."""

    def __init__(self, channels: int, settings: StageSettings) -> None:
        super().__init__()
        self.heads = head_count(channels, settings.head_dim)
        self.backend = settings.backend
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden`` ``[B, channels, H, W]`` to the same shape."""
        tokens = self.norm(hidden).flatten(2).transpose(1, 2)  # [B, L, channels]
        q, k, v = split_heads(self.qkv(tokens), self.heads)
        mixed = merge_heads(attention(q, k, v, backend=self.backend))
        projected: Tensor = self.project(mixed)
        return hidden + projected.transpose(1, 2).reshape(hidden.shape)


def head_count(channels: int, head_dim: int) -> int:
    """The fewest heads that split ``channels`` evenly into heads of at most ``head_dim``."""
    return next(n for n in range(1, channels + 1) if channels % n == 0 and channels // n <= head_dim)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with up to 32 groups of at least four channels (one group where four do not divide them)."""
    groups = max((n for n in range(1, 33) if channels % n == 0 and channels // n >= 4), default=1)
    return nn.GroupNorm(groups, channels)


def zero_conv(channels_in: int, channels_out: int, kernel_size: int = 3) -> nn.Conv2d:
    """A convolution that keeps the resolution and whose weight and bias are zero."""
    layer = nn.Conv2d(channels_in, channels_out, kernel_size, padding=kernel_size // 2)
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
