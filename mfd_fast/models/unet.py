"""A convolutional UNet for pictures, in the manner of DDPM++ (Song et al. 2021) and ADM (Dhariwal and Nichol 2021)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfd_fast.models.attention import check_backend
from mfd_fast.models.base import VelocityNetwork, checked_count
from mfd_fast.models.embeddings import ConditionEmbedding
from mfd_fast.models.unet_blocks import Stage, StageSettings, group_norm, zero_conv

UNET_PRESETS: dict[str, dict[str, Any]] = {
    "32x32": {"width": 128, "multipliers": [1, 2, 2, 2], "blocks_per_level": 2, "attention_levels": [1]},
    "8x8": {"width": 32, "multipliers": [1, 2], "blocks_per_level": 1, "attention_levels": [1]},
}
"""Options by picture size: ``build_model("unet", (3, 32, 32), **UNET_PRESETS["32x32"])`` has about 42.9M parameters."""


class UNet(VelocityNetwork):
    """Residual blocks at falling, then rising resolution with skip connections, all modulated by time and label.

    Args:
        sample_shape: ``(channels, height, width)``, both sides divisible by 2 for every level but the first.
        num_classes: number of labels, None for none.
        width: channels of the first level.
        multipliers: channels of each level over ``width``.
        blocks_per_level: residual blocks of a level on the way down; one more on the way up.
        attention_levels: levels (0 = full resolution) with attention after each block; the middle always has it.
        head_dim: largest size of an attention head.
        dropout: share of the features dropped inside residual blocks.
        time_features: size of the Fourier features of time, even.
        attention: a name in ``ATTENTION_BACKENDS``.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        num_classes: int | None = None,
        *,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks_per_level: int = 2,
        attention_levels: Sequence[int] = (1,),
        head_dim: int = 64,
        dropout: float = 0.0,
        time_features: int = 128,
        attention: str = "sdpa",
    ) -> None:
        options: dict[str, Any] = {"width": width, "multipliers": multipliers, "blocks_per_level": blocks_per_level}
        options |= {"attention_levels": attention_levels, "head_dim": head_dim, "dropout": dropout}
        options |= {"time_features": time_features, "attention": attention}
        super().__init__(sample_shape, num_classes, options)
        check_options(self.sample_shape, self.options)
        settings = StageSettings(4 * width, head_dim, dropout, attention)
        widths = [width * multiplier for multiplier in multipliers]
        self.condition = ConditionEmbedding(settings.condition_width, self.num_classes, time_features)
        self.enter = nn.Conv2d(self.sample_shape[0], width, 3, padding=1)
        down, skips = down_stages(width, widths, blocks_per_level, set(attention_levels), settings)
        self.down = nn.ModuleList(down)
        middle = widths[-1]
        self.middle = nn.ModuleList([Stage(middle, middle, settings, attend=True), Stage(middle, middle, settings)])
        self.up = nn.ModuleList(up_stages(widths, skips, blocks_per_level, set(attention_levels), settings))
        self.leave_norm = group_norm(widths[0])
        self.leave = zero_conv(widths[0], self.sample_shape[0])
        self.feature_width = middle

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """The velocity ``[B, C, H, W]`` at ``x`` ``[B, C, H, W]``, ``t``, ``label`` and ``r`` ``[B]``."""
        self.check_inputs(x, t)
        condition = self.condition(t, label, x.dtype, r)
        hidden, skips = self._bottleneck(x, condition)
        for stage in self.up:
            hidden = torch.cat([hidden, skips.pop()], dim=1) if stage.takes_skip else hidden
            hidden = stage(hidden, condition)
        velocity: Tensor = self.leave(functional.silu(self.leave_norm(hidden)))
        return velocity

    def features(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The mean over the pixels of the normed bottleneck, ``[B, its channels]``."""
        self.check_inputs(x, t)
        hidden, _ = self._bottleneck(x, self.condition(t, label, x.dtype))
        return functional.layer_norm(hidden.flatten(2).transpose(1, 2), hidden.shape[1:2]).mean(1)

    def _bottleneck(self, x: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The hidden state after the middle, and the skip connections on the way to it."""
        hidden = self.enter(x)
        skips = [hidden]
        for stage in self.down:
            hidden = stage(hidden, condition)
            skips.append(hidden)
        for stage in self.middle:
            hidden = stage(hidden, condition)
        return hidden, skips


def down_stages(
    width: int, widths: Sequence[int], blocks: int, attention_levels: set[int], settings: StageSettings
) -> tuple[list[Stage], list[int]]:
    """The stages at falling resolution, and the channels of every skip connection."""
    stages, skips = [], [width]
    for level, channels in enumerate(widths):
        for _ in range(blocks):
            stages.append(Stage(skips[-1], channels, settings, attend=level in attention_levels))
            skips.append(channels)
        if level < len(widths) - 1:
            stages.append(Stage(channels, channels, settings, resample="down"))
            skips.append(channels)
    return stages, skips


def up_stages(
    widths: Sequence[int], skips: Sequence[int], blocks: int, attention_levels: set[int], settings: StageSettings
) -> list[Stage]:
    """The stages at rising resolution; each but the resampling ones takes the last skip connection not yet taken."""
    stages, left, channels = [], list(skips), widths[-1]
    for level in reversed(range(len(widths))):
        for _ in range(blocks + 1):
            attend = level in attention_levels
            stages.append(Stage(channels + left.pop(), widths[level], settings, attend=attend, takes_skip=True))
            channels = widths[level]
        if level > 0:
            stages.append(Stage(channels, channels, settings, resample="up"))
    return stages


def check_options(sample_shape: Sequence[int], options: dict[str, Any]) -> None:
    """Raise ValueError naming the first option that makes no UNet for ``sample_shape``."""
    for name in ("width", "blocks_per_level", "head_dim"):
        checked_count(name, options[name])
    levels = len(options["multipliers"])
    if levels == 0 or any(m < 1 for m in options["multipliers"]):
        raise ValueError(f"multipliers must be one or more positive integers, got {options['multipliers']}")
    if any(not 0 <= level < levels for level in options["attention_levels"]):
        raise ValueError(f"attention_levels must be in 0..{levels - 1}, got {options['attention_levels']}")
    if not 0 <= options["dropout"] < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, got {options['dropout']}")
    factor = 2 ** (levels - 1)
    if len(sample_shape) != 3 or sample_shape[1] % factor or sample_shape[2] % factor:
        expected = f"(channels, height, width) with sides divisible by {factor} for {levels} levels"
        raise ValueError(f"sample_shape must be {expected}, got {tuple(sample_shape)}")
    check_backend(options["attention"])
