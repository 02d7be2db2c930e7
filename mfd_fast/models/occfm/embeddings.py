"""Fixed features of position, frame, time and ego motion, and the learned bias between frames."""

import math

import torch
from torch import Tensor, nn

BUCKETS = 32
MAX_DISTANCE = 16


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of ``positions`` ``[N]`` at ``width / 2`` frequencies: ``[N, width]`` float64."""
    half = width // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def place_features(height: int, width: int, features: int) -> Tensor:
    """Features of the cells of a frame in reading order, ``[1, height * width, features]`` float32.

    Released checkpoints hold the features of a grid one cell wider than the frame, cut to length: the cell in reading
    order ``i`` has column ``i % (side + 1)`` and row ``i // (side + 1)``, with ``side = floor(sqrt(height * width))``.
    Columns fill the first half of the features.
    """
    cells = torch.arange(height * width)
    side = math.isqrt(height * width) + 1
    halves = [sinusoids(cells % side, features // 2), sinusoids(cells // side, features // 2)]
    return torch.cat(halves, dim=1).float()[None]


def frame_features(frames: int, features: int) -> Tensor:
    """Features of the frames of a sequence, ``[1, frames, features]`` float32."""
    return sinusoids(torch.arange(frames), features).float()[None]


def time_features(t: Tensor, features: int) -> Tensor:
    """Cosines, then sines, of ``t`` ``[B]`` in [0, 1000]: ``[B, features]``, at least float32."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    half = features // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000.0) / half))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def pose_features(trajectory: Tensor, frequencies: int) -> Tensor:
    """Sines and cosines of poses ``[B, L, 2]`` at ``frequencies`` scales from 1 to below 100.

    ``[B, L * frequencies * 4]``, ordered by pose, scale, sine before cosine, coordinate.
    """
    scales = 100.0 ** (torch.arange(frequencies, device=trajectory.device) / frequencies)
    angles = scales.to(trajectory.dtype)[:, None] * trajectory[:, :, None, :]  # [B, L, scale, coordinate]
    return torch.stack([angles.sin(), angles.cos()], dim=3).flatten(1)


class FrameBias(nn.Module):
    """A learned number for every head and bucket of the distance between two frames, added to attention scores.

    Buckets as in T5 (Raffel et al. 2020): 16 for keys at or before the query's frame, 16 for later ones; exact up to
    distance 7, logarithmic up to 15.
    """

    buckets: Tensor

    def __init__(self, heads: int, frames: int) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(BUCKETS, heads)
        self.register_buffer("buckets", frame_buckets(frames), persistent=False)

    def forward(self) -> Tensor:
        """The bias ``[heads, frames, frames]`` (query, key)."""
        bias: Tensor = self.relative_attention_bias(self.buckets)
        return bias.permute(2, 0, 1)


def frame_buckets(frames: int) -> Tensor:
    """The bucket of every (query, key) pair of frames, int64 ``[frames, frames]``."""
    one_side, exact = BUCKETS // 2, BUCKETS // 4
    index = torch.arange(frames)
    behind = index[:, None] - index[None, :]  # frames by which the key lies before the query
    distance = behind.abs()
    spread = torch.log(distance.clamp(min=exact) / exact) / math.log(MAX_DISTANCE / exact)
    far = (exact + (spread * (one_side - exact)).long()).clamp(max=one_side - 1)
    return torch.where(distance < exact, distance, far) + one_side * (behind < 0)
