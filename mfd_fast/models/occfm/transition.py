"""The transition model: a U-Net over frames with convolutions in space and attention in space and time."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mfd_fast.models.attention import check_backend
from mfd_fast.models.base import checked_count
from mfd_fast.models.occfm.blocks import (
    AttentionLayer,
    FrameConv,
    FrameUpsample,
    ResnetBlock,
    TokenBlock,
    to_frames,
    to_sequences,
    to_tokens,
)
from mfd_fast.models.occfm.embeddings import FrameBias, frame_features, place_features, pose_features, time_features

MID_HEAD_DIM = 32
"""Width of a head of the spatial attention at the bottom, whatever ``attn_dim`` is."""


class TransitionModel(nn.Module):
    """Predicts the velocity of all frames of a sequence of latents, in the convention of OccFM (0 = noise, 1 = data).

    Parameter names, shapes and numerics are those of the class ``FLOW_MATCHING_DOWN_X4_DiT`` at commit 6495984 of
    Orbis36/OccFM-NeurIPS2025. Differences that cannot be seen from outside: fixed embeddings are buffers; time is
    modulated once for each sequence instead of once for each row of tokens; frames are convolved as pictures.

    Args:
        in_channels: channels of a latent; ``out_channels`` (None: the same) those of its velocity.
        trajectory_length: poses that are looked at: 6 for the history alone, 12 with the future.
        frames: frames of a sequence.
        input_size: height and width of a latent, divisible by ``2 ** (levels - 1)``.
        model_channels: features of time and ego motion; equal to the channels of the first level.
        channel_multi: channels of the levels, over ``init_3d_conv_channels``.
        init_3d_conv_channels: channels after the first convolution, ``init_kernel_size`` its kernel (odd).
        attn_dim: width of a head of the attention over frames.
        temporal_attn_head, spatial_attn_head: heads.
        traj_fourier_freq: scales of the features of a pose.
        attention: a name in ``ATTENTION_BACKENDS``.
    """

    pos_embed: Tensor
    temp_embed: Tensor

    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int | None = None,
        trajectory_length: int = 12,
        *,
        frames: int = 12,
        input_size: Sequence[int] = (50, 50),
        model_channels: int = 128,
        channel_multi: Sequence[int] = (2, 4),
        init_3d_conv_channels: int = 64,
        init_kernel_size: int = 7,
        attn_dim: int = 32,
        temporal_attn_head: int = 8,
        spatial_attn_head: int = 8,
        traj_fourier_freq: int = 8,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        self.shape = (checked_count("frames", frames), checked_count("in_channels", in_channels), *input_size)
        self.model_channels = model_channels
        self.traj_length = checked_count("trajectory_length", trajectory_length)
        self.traj_fourier_freq = checked_count("traj_fourier_freq", traj_fourier_freq)
        self.num_levels = len(channel_multi)
        widths = [init_3d_conv_channels * multiple for multiple in channel_multi]
        _check_sizes(self.shape, [init_3d_conv_channels, *widths], model_channels, init_kernel_size, spatial_attn_head)
        check_backend(attention)

        def resnet(wide_in: int, wide_out: int) -> ResnetBlock:
            return ResnetBlock(wide_in, wide_out, model_channels)

        def tokens(width: int) -> TokenBlock:
            return TokenBlock(width, spatial_attn_head, model_channels, attention)

        def over_frames(width: int) -> AttentionLayer:
            return AttentionLayer(width, temporal_attn_head, attn_dim, True, attention)

        self.t_embedder = _two_layers(model_channels, model_channels)
        self.time_rel_pos_bias = FrameBias(temporal_attn_head, frames)
        first, last = init_3d_conv_channels, widths[-1]
        self.init_conv = FrameConv(in_channels, first, init_kernel_size, padding=init_kernel_size // 2)
        self.init_temporal_attn = over_frames(first)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, (wide_in, wide_out) in enumerate(zip([first, *widths], widths, strict=False)):
            down = FrameConv(wide_out, wide_out, 4, 2, 1) if level + 1 < self.num_levels else nn.Identity()
            parts = [resnet(wide_in, wide_out), resnet(wide_out, wide_out), tokens(wide_out), tokens(wide_out)]
            # The place between is empty in the released class, and its number is part of the names.
            self.downs.append(nn.ModuleList([*parts, nn.Identity(), down]))
        self.mid_block1 = resnet(last, last)
        self.mid_spatial_attn = AttentionLayer(last, spatial_attn_head, MID_HEAD_DIM, False, attention)
        self.mid_temporal_attn = over_frames(last)
        self.mid_block2 = resnet(last, last)
        for wide_out, wide_in in reversed(list(zip([first, *widths], widths, strict=False))):
            up = FrameUpsample(wide_out) if len(self.ups) + 1 < self.num_levels else nn.Identity()
            parts = [resnet(2 * wide_in, wide_out), resnet(wide_out, wide_out), tokens(wide_out), tokens(wide_out)]
            self.ups.append(nn.ModuleList([*parts, up]))
        self.final_conv = nn.Sequential(
            ResnetBlock(2 * first, first), FrameConv(first, in_channels if out_channels is None else out_channels, 1)
        )
        self.traj_encoder = _two_layers(self.traj_length * self.traj_fourier_freq * 4, model_channels)
        self.register_buffer("pos_embed", place_features(self.shape[2], self.shape[3], model_channels))
        self.register_buffer("temp_embed", frame_features(frames, model_channels))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (self.t_embedder[0], self.t_embedder[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, trajectory: Tensor | None = None) -> Tensor:
        """The velocity of every frame.

        Args:
            x: ``[B, frames, in_channels, H, W]``.
            t: ``[B]`` in [0, 1000]; 0 is noise.
            trajectory: ``[B, L, 2]`` with at least ``trajectory_length`` poses, of which the first are looked at; or
                None.

        Returns:
            ``[B, frames, out_channels, H, W]``.
        """
        self._check_inputs(x, t, trajectory)
        condition: Tensor = self.t_embedder(time_features(t, self.model_channels).to(x.dtype))
        if trajectory is not None:
            poses = pose_features(trajectory[:, : self.traj_length], self.traj_fourier_freq)
            condition = condition + self.traj_encoder(poses.to(x.dtype))
        bias, frames = self.time_rel_pos_bias(), self.shape[0]
        # Channels last in memory: tokens are then views of frames.
        x = self.init_conv(x.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        x = x + self.init_temporal_attn(x, frames, bias)
        begin = x
        kept: list[Tensor] = []
        for level, parts in enumerate(self.downs):
            block1, block2, spatial, temporal, _, down = cast(nn.ModuleList, parts)
            x = block2(block1(x, condition), condition)
            x = self._mix(x, spatial, temporal, condition, with_places=level == 0)
            kept.append(x)
            x = down(x)
        x = self.mid_spatial_attn(self.mid_block1(x, condition), frames)
        x = self.mid_block2(self.mid_temporal_attn(x, frames, bias), condition)
        for parts in self.ups:
            block1, block2, spatial, temporal, up = cast(nn.ModuleList, parts)
            x = block2(block1(torch.cat([x, kept.pop()], dim=1), condition), condition)
            x = up(self._mix(x, spatial, temporal, condition, with_places=False))
        velocity: Tensor = self.final_conv(torch.cat([x, begin], dim=1))
        return to_sequences(velocity, frames)

    def _mix(
        self, x: Tensor, spatial: nn.Module, temporal: nn.Module, condition: Tensor, *, with_places: bool
    ) -> Tensor:
        """Attention within each frame, then within each place."""
        tokens = to_tokens(x, self.shape[0])
        tokens = spatial(tokens + self.pos_embed[:, None] if with_places else tokens, condition)
        tokens = tokens.transpose(1, 2)  # [B, places, F, C]
        tokens = temporal(tokens + self.temp_embed[:, None] if with_places else tokens, condition)
        return to_frames(tokens.transpose(1, 2), x.shape[2])

    def _check_inputs(self, x: Tensor, t: Tensor, trajectory: Tensor | None) -> None:
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must have shape [B, {str(list(self.shape))[1:]}, got {list(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape [{x.shape[0]}], one time for each row of x, got {list(t.shape)}")
        if trajectory is None:
            return
        rows, length = x.shape[0], self.traj_length
        if trajectory.dim() != 3 or trajectory.shape[0] != rows or trajectory.shape[2] != 2:
            raise ValueError(f"trajectory must have shape [{rows}, L, 2], got {list(trajectory.shape)}")
        if trajectory.shape[1] < length:
            raise ValueError(
                f"trajectory must have at least {length} poses (trajectory_length), got {trajectory.shape[1]}"
            )


def _two_layers(wide_in: int, wide_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(wide_in, wide_out), nn.SiLU(), nn.Linear(wide_out, wide_out))


def _check_sizes(
    shape: tuple[int, ...], widths: Sequence[int], model_channels: int, init_kernel_size: int, heads: int
) -> None:
    """Raise ValueError for sizes that do not fit each other; ``widths`` begins with the first convolution's."""
    if len(shape) != 4 or len(widths) < 2 or any(width < 1 for width in widths):
        raise ValueError(
            f"input_size must be (height, width) and channel_multi one or more positive numbers, got {shape[2:]} and "
            f"channels {widths[1:]}"
        )
    levels = len(widths) - 1
    if shape[2] % 2 ** (levels - 1) or shape[3] % 2 ** (levels - 1):
        raise ValueError(f"input_size must be divisible by {2 ** (levels - 1)} for {levels} levels, got {shape[2:]}")
    if widths[1] != model_channels or model_channels % 4:
        raise ValueError(
            f"model_channels must be divisible by 4 and equal init_3d_conv_channels * channel_multi[0] = {widths[1]}, "
            f"got {model_channels}"
        )
    if init_kernel_size % 2 == 0:
        raise ValueError(f"init_kernel_size must be odd, got {init_kernel_size}")
    if any(width % heads for width in widths):
        raise ValueError(f"the channels of every level must be divisible by spatial_attn_head = {heads}, got {widths}")
