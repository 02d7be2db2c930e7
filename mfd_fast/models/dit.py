"""A diffusion transformer for pictures (DiT, Peebles and Xie 2023)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfd_fast.models.attention import attention, check_backend, merge_heads, split_heads
from mfd_fast.models.base import VelocityNetwork, checked_count, zero_linear
from mfd_fast.models.embeddings import ConditionEmbedding

TWICE_SQRT_2_OVER_PI = 1.5957691216057308


class DiT(VelocityNetwork):
    """Transformer over square patches whose blocks are modulated by time and label (AdaLN-zero).

    Args:
        sample_shape: ``(channels, height, width)``, both sides divisible by ``patch_size``.
        num_classes: number of labels, None for none.
        patch_size: side of a patch.
        width: size of a token; divisible by ``heads`` and by 4.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: hidden size of the MLPs over ``width``.
        qk_norm: whether queries and keys are RMS-normed per head.
        time_features: size of the Fourier features of time, even.
        attention: a name in ``ATTENTION_BACKENDS``.
    """

    position: Tensor

    def __init__(
        self,
        sample_shape: Sequence[int],
        num_classes: int | None = None,
        *,
        patch_size: int = 2,
        width: int = 256,
        depth: int = 6,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        time_features: int = 256,
        attention: str = "sdpa",
    ) -> None:
        options: dict[str, Any] = {
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
        }
        options |= {"qk_norm": qk_norm, "time_features": time_features, "attention": attention}
        super().__init__(sample_shape, num_classes, options)
        for name in ("patch_size", "width", "depth", "heads"):
            checked_count(name, options[name])
        self.grid = patch_grid(self.sample_shape, patch_size)
        if width % 4 or width % heads:
            raise ValueError(f"width must be divisible by 4 and by heads ({heads}), got {width}")
        check_backend(attention)
        patch_features = self.sample_shape[0] * patch_size**2
        self.condition = ConditionEmbedding(width, self.num_classes, time_features)
        self.enter = nn.Linear(patch_features, width)
        self.register_buffer("position", position_embedding(*self.grid, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qk_norm, attention) for _ in range(depth))
        self.modulation = zero_linear(width, 2 * width)
        self.leave = zero_linear(width, patch_features)
        self.feature_width = width

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """The velocity ``[B, C, H, W]`` at ``x`` ``[B, C, H, W]``, ``t``, ``label`` and ``r`` ``[B]``."""
        self.check_inputs(x, t)
        condition = self.condition(t, label, x.dtype, r)
        tokens = self._tokens(x, condition, len(self.blocks))
        scale, shift = self.modulation(condition).chunk(2, dim=1)
        return from_patches(self.leave(modulated_norm(tokens, scale, shift)), self.grid, self.sample_shape)

    def features(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The mean of the normed tokens after the first half of the blocks, ``[B, width]``."""
        self.check_inputs(x, t)
        tokens = self._tokens(x, self.condition(t, label, x.dtype), (len(self.blocks) + 1) // 2)
        return functional.layer_norm(tokens, tokens.shape[2:], eps=1e-6).mean(1)

    def _tokens(self, x: Tensor, condition: Tensor, blocks: int) -> Tensor:
        """Tokens ``[B, L, width]`` after the first ``blocks`` blocks."""
        tokens: Tensor = self.enter(to_patches(x, self.grid)) + self.position
        for block in self.blocks[:blocks]:
            tokens = block(tokens, condition)
        return tokens


class Block(nn.Module):
    """Attention and MLP, each as ``h <- h + gate * f(norm(h) * (1 + scale) + shift)`` with gates that begin at zero."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, backend: str) -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.modulation = zero_linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.project = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, checked_count("width * mlp_ratio", int(width * mlp_ratio)))
        self.mlp_out = nn.Linear(self.mlp_in.out_features, width)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """``tokens`` ``[B, L, width]``, ``condition`` ``[B, width]``, to ``[B, L, width]``."""
        scale_a, shift_a, gate_a, scale_m, shift_m, gate_m = self.modulation(condition).chunk(6, dim=1)
        tokens = tokens + gate_a[:, None] * self._attend(modulated_norm(tokens, scale_a, shift_a))
        hidden = self.mlp_in(modulated_norm(tokens, scale_m, shift_m))
        out: Tensor = tokens + gate_m[:, None] * self.mlp_out(gelu_tanh(hidden))
        return out

    def _attend(self, tokens: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(tokens), self.heads)
        mixed = attention(self.q_norm(q), self.k_norm(k), v, backend=self.backend)
        projected: Tensor = self.project(merge_heads(mixed))
        return projected


class HeadNorm(nn.Module):
    """``x / rms(x) * gain`` over the last dimension; unlike nn.RMSNorm the gain may be wider than x (autocast)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., head_dim]`` to the same shape and dtype."""
        return functional.rms_norm(x, x.shape[-1:]) * self.gain.to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, ``x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`` (Hendrycks and Gimpel 2016).

    ``(1 + tanh(y)) / 2`` is ``sigmoid(2 y)``, whose compiled form is three times as fast on the CPU.
    """
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(TWICE_SQRT_2_OVER_PI * (x + 0.044715 * x * x * x))
    return functional.gelu(x, approximate="tanh")


def modulated_norm(tokens: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``layer_norm(tokens) * (1 + scale) + shift``; tokens ``[B, L, width]``, scale and shift ``[B, width]``."""
    normed = functional.layer_norm(tokens, tokens.shape[2:], eps=1e-6)
    return torch.addcmul(normed + shift[:, None], normed, scale[:, None])


def patch_grid(sample_shape: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches; ValueError unless the sample is ``(C, H, W)`` and the patches fill it."""
    if len(sample_shape) != 3 or sample_shape[1] % patch_size or sample_shape[2] % patch_size:
        expected = f"(channels, height, width) with sides divisible by patch_size ({patch_size})"
        raise ValueError(f"sample_shape must be {expected}, got {tuple(sample_shape)}")
    return sample_shape[1] // patch_size, sample_shape[2] // patch_size


def to_patches(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """``[B, C, H, W]`` to ``[B, rows * columns, C * patch * patch]``."""
    rows, columns = grid
    batch, channels, height, width = x.shape
    split = x.reshape(batch, channels, rows, height // rows, columns, width // columns)
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_patches(tokens: Tensor, grid: tuple[int, int], sample_shape: Sequence[int]) -> Tensor:
    """The inverse of `to_patches`."""
    rows, columns = grid
    channels, height, width = sample_shape
    batch = tokens.shape[0]
    split = tokens.reshape(batch, rows, columns, channels, height // rows, width // columns)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def position_embedding(rows: int, columns: int, width: int) -> Tensor:
    """Fixed sines and cosines of row and column, ``[rows * columns, width]`` float32; half the width for each."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))

    def sincos(positions: Tensor) -> Tensor:
        angles = positions.flatten()[:, None].float() * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([sincos(row), sincos(column)], dim=1)
