"""OccFM as a velocity field of this package: future frames are the sample, history and ego motion the condition."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfd_fast.models.base import VelocityNetwork
from mfd_fast.models.occfm.transition import TransitionModel

TIME_SCALE = 1000.0
"""The transition model wants times in [0, 1000], from noise to data."""


class OccupancyVelocity(VelocityNetwork):
    """``v(x, t, history, trajectory)``: minus the transition model's velocity of the future frames at ``1000 (1 - t)``.

    Here 0 is data and 1 is noise and the velocity is noise - data; in OccFM time and sign are the other way round.
    The history stays as it is on the whole path, and its velocity is dropped. Without a history (guidance's negative
    condition) its frames are zero, the ego motion stays. Latents are in OccFM's training units (``RESCALE_FACTOR``
    times the compressor's).

    Args:
        sample_shape: ``(future frames, channels, height, width)``.
        num_classes: None; there are no labels.
        history_frames: frames before the future, 0 for as many as the future has.
        trajectory_length: poses that are looked at, of those of all frames; 0 for all.
        model_channels, channel_multi, init_3d_conv_channels, init_kernel_size, attn_dim, temporal_attn_head,
        spatial_attn_head, attention: see `TransitionModel`.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        num_classes: int | None = None,
        *,
        history_frames: int = 0,
        trajectory_length: int = 0,
        model_channels: int = 128,
        channel_multi: Sequence[int] = (2, 4),
        init_3d_conv_channels: int = 64,
        init_kernel_size: int = 7,
        attn_dim: int = 32,
        temporal_attn_head: int = 8,
        spatial_attn_head: int = 8,
        attention: str = "sdpa",
    ) -> None:
        network: dict[str, Any] = {
            "model_channels": model_channels,
            "channel_multi": channel_multi,
            "init_3d_conv_channels": init_3d_conv_channels,
            "init_kernel_size": init_kernel_size,
            "attn_dim": attn_dim,
            "temporal_attn_head": temporal_attn_head,
            "spatial_attn_head": spatial_attn_head,
            "attention": attention,
        }
        options = {"history_frames": history_frames, "trajectory_length": trajectory_length, **network}
        super().__init__(sample_shape, num_classes, options)
        if self.num_classes is not None or len(self.sample_shape) != 4:
            raise ValueError(
                f"occfm needs samples (frames, channels, height, width) and no classes, got {self.sample_shape} and "
                f"num_classes={num_classes}"
            )
        future, channels, *size = self.sample_shape
        if history_frames < 0 or trajectory_length < 0:
            raise ValueError(
                f"history_frames and trajectory_length must be at least 0, got {history_frames} and {trajectory_length}"
            )
        self.history_frames = history_frames or future
        frames = self.history_frames + future
        self.network = TransitionModel(
            channels, trajectory_length=trajectory_length or frames, frames=frames, input_size=size, **network
        )

    def forward(self, x: Tensor, t: Tensor, history: Tensor | None = None, trajectory: Tensor | None = None) -> Tensor:
        """The velocity of the future frames.

        Args:
            x: ``[B, future, C, H, W]``, the future frames at time t.
            t: ``[B]`` in [0, 1]; 1 is noise.
            history: ``[B, history_frames, C, H, W]``; None is all zero.
            trajectory: ``[B, frames, 2]``, how the vehicle moves at every frame; None for a model without.
        """
        self.check_inputs(x, t)
        shape = (x.shape[0], self.history_frames, *self.sample_shape[1:])
        if history is None:
            history = x.new_zeros(shape)
        elif history.shape != shape:
            raise ValueError(f"history must have shape {list(shape)}, got {list(history.shape)}")
        sequence = torch.cat([history.to(x.dtype), x], dim=1)
        velocity: Tensor = self.network(sequence, (1 - t) * TIME_SCALE, trajectory)
        return -velocity[:, self.history_frames :]

    def null_condition(self) -> dict[str, Tensor]:
        """What guidance pushes away from: no history, ``[1, history_frames, C, H, W]``; the ego motion stays."""
        like = self.network.init_conv.weight
        return {"history": like.new_zeros((1, self.history_frames, *self.sample_shape[1:]))}
