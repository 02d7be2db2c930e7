"""Networks of the shapes that matter on a GPU, with random weights: SANA 1.6B and an occupancy forecaster.

Only sizes are taken over: time, memory and launches depend on them, not on what the weights say.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Case(NamedTuple):
    """A network with what it is called with."""

    name: str
    network: nn.Module
    sample_shape: tuple[int, ...]
    condition: Callable[[int], dict[str, Tensor]]
    """Condition of so many rows, on the CPU."""
    targets: tuple[str, ...]
    """Layers that get LoRA."""
    student_steps: int


def sana_case(toy: bool) -> Case:
    """SANA 1.6B's transformer: 20 blocks of width 2240, 1024 tokens of 32x32 latents, 300 tokens of text."""
    sizes = {"layers": 2, "heads": 2, "cross_heads": 2, "side": 8, "text": 6} if toy else {
        "layers": 20, "heads": 70, "cross_heads": 20, "side": 32, "text": 300}  # fmt: skip
    exact = importlib.util.find_spec("diffusers") is not None
    network = _exact_sana(**sizes) if exact else SanaShaped(**sizes)
    width = 32 * sizes["heads"]
    text_width = 64 if toy else 2304

    def condition(rows: int) -> dict[str, Tensor]:
        return {"text": torch.randn(rows, sizes["text"], text_width)}

    name = f"SANA 1.6B {'(toy) ' if toy else ''}by {'diffusers' if exact else 'a stand-in'}, width {width}"
    return Case(name, network, (32, sizes["side"], sizes["side"]), condition, ("to_q", "to_k", "to_v"), 4)


def occupancy_case(toy: bool) -> Case:
    """Occupancy latents of 12 frames x 16 x 50 x 50, about 220 GFLOP a row."""
    frames, side, width, depth = (3, 6, 16, 2) if toy else (12, 50, 96, 10)
    network = OccupancyShaped(16, width, depth)
    shape = (frames, 16, side, side)
    return Case(
        f"occupancy {'(toy) ' if toy else ''}width {width}", network, shape, _past(shape), ("qkv", "project"), 1
    )


def _past(shape: tuple[int, ...]) -> Callable[[int], dict[str, Tensor]]:
    return lambda rows: {"past": torch.randn(rows, *shape)}


def _exact_sana(layers: int, heads: int, cross_heads: int, side: int, text: int) -> nn.Module:
    from diffusers import SanaTransformer2DModel

    width = 32 * heads
    toy = {"caption_channels": 64} if layers < 20 else {}
    return DiffusersSana(
        SanaTransformer2DModel(
            num_layers=layers, num_attention_heads=heads, attention_head_dim=32,
            num_cross_attention_heads=cross_heads, cross_attention_head_dim=width // cross_heads,
            cross_attention_dim=width, sample_size=side, **toy,
        )
    )  # fmt: skip


class DiffusersSana(nn.Module):
    """diffusers' SANA as ``f(x, t, text)``."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The velocity at ``x`` ``[B, 32, side, side]``, ``t`` ``[B]``, ``text`` ``[B, tokens, channels]``."""
        velocity: Tensor = self.transformer(x, text.to(x.dtype), timestep=t * 1000, return_dict=False)[0]
        return velocity


class SanaShaped(nn.Module):
    """The same operations as SANA in the same sizes, for where diffusers is not installed."""

    def __init__(self, layers: int, heads: int, cross_heads: int, side: int, text: int) -> None:
        super().__init__()
        width = 32 * heads
        self.enter = nn.Conv2d(32, width, 1)
        self.text = nn.Linear(64 if layers < 20 else 2304, width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(SanaBlock(width, heads, cross_heads, side) for _ in range(layers))
        self.leave = nn.Linear(width, 32)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The velocity at ``x`` ``[B, 32, side, side]``, ``t`` ``[B]``, ``text`` ``[B, tokens, channels]``."""
        tokens = self.enter(x).flatten(2).transpose(1, 2)
        modulation = self.time(time_features(t, 256).to(x.dtype))
        text = self.text(text.to(x.dtype))
        for block in self.blocks:
            tokens = block(tokens, text, modulation)
        velocity: Tensor = self.leave(tokens).transpose(1, 2).reshape(x.shape)
        return velocity


class SanaBlock(nn.Module):
    """Linear attention, cross attention to the text, and a gated feed-forward with a depthwise convolution."""

    def __init__(self, width: int, heads: int, cross_heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.cross_heads, self.side = heads, cross_heads, side
        self.shift = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.cross_q, self.cross_k, self.cross_v, self.cross_out = (nn.Linear(width, width) for _ in range(4))
        hidden = int(2.5 * width)
        self.inverted = nn.Conv2d(width, 2 * hidden, 1)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.point = nn.Conv2d(hidden, width, 1, bias=False)

    def forward(self, tokens: Tensor, text: Tensor, modulation: Tensor) -> Tensor:
        """``tokens`` ``[B, L, width]``, ``text`` ``[B, T, width]``, ``modulation`` ``[B, 6 width]``."""
        width = tokens.shape[2:]
        parts = modulation.unflatten(1, (6, -1)) + self.shift
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts[:, :, None].unbind(1)
        tokens = tokens + gate_a * self._linear_attention(
            functional.layer_norm(tokens, width) * (1 + scale_a) + shift_a
        )
        q, k, v = (
            layer(of).unflatten(2, (self.cross_heads, -1)).transpose(1, 2)
            for layer, of in ((self.cross_q, tokens), (self.cross_k, text), (self.cross_v, text))
        )
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.cross_out(mixed)
        return tokens + gate_m * self._feed_forward(functional.layer_norm(tokens, width) * (1 + scale_m) + shift_m)

    def _linear_attention(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, 32)).permute(0, 2, 3, 1) for layer in (self.to_q, self.to_k, self.to_v)
        )
        q, k, v = functional.relu(q.float()), functional.relu(k.float()), v.float()  # [B, heads, 32, L]
        total = functional.pad(v, (0, 0, 0, 1), value=1.0) @ k.transpose(2, 3) @ q
        mixed = total[:, :, :-1] / (total[:, :, -1:] + 1e-15)
        out: Tensor = self.to_out(mixed.flatten(1, 2).transpose(1, 2).to(x.dtype))
        return out

    def _feed_forward(self, x: Tensor) -> Tensor:
        image = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        hidden, gate = self.depthwise(functional.silu(self.inverted(image))).chunk(2, 1)
        out: Tensor = self.point(hidden * functional.silu(gate)).flatten(2).transpose(1, 2)
        return out


class OccupancyShaped(nn.Module):
    """Convolutions over space and time, and attention within each frame, on ``[B, frames, channels, H, W]``."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.enter = nn.Conv3d(2 * channels, width, 1)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.blocks = nn.ModuleList(OccupancyBlock(width) for _ in range(depth))
        self.leave = nn.Conv3d(width, channels, 1)

    def forward(self, x: Tensor, t: Tensor, past: Tensor) -> Tensor:
        """The velocity at ``x`` ``[B, frames, channels, H, W]``, ``t`` ``[B]``, ``past`` like ``x``."""
        hidden = self.enter(torch.cat([x, past.to(x.dtype)], 2).transpose(1, 2))
        scale, shift = self.time(time_features(t, 256).to(x.dtype))[:, :, None, None, None].chunk(2, 1)
        for block in self.blocks:
            hidden = block(hidden, scale, shift)
        velocity: Tensor = self.leave(hidden).transpose(1, 2)
        return velocity


class OccupancyBlock(nn.Module):
    """A 3x3x3 convolution, attention among the places of a frame, and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.conv = nn.Conv3d(width, width, 3, padding=1)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """``x`` ``[B, width, frames, H, W]``; scale and shift ``[B, width, 1, 1, 1]``."""
        x = x + self.conv(functional.silu(self.norm(x) * (1 + scale) + shift))
        batch, width, frames, height, columns = x.shape
        tokens = x.permute(0, 2, 3, 4, 1).reshape(batch, frames, height * columns, width)
        normed = functional.layer_norm(tokens, (width,))
        q, k, v = self.qkv(normed).chunk(3, -1)
        tokens = tokens + self.project(functional.scaled_dot_product_attention(q, k, v))
        hidden = functional.gelu(self.mlp_in(functional.layer_norm(tokens, (width,))), approximate="tanh")
        tokens = tokens + self.mlp_out(hidden)
        return tokens.reshape(batch, frames, height, columns, width).permute(0, 4, 1, 2, 3)


def time_features(t: Tensor, size: int) -> Tensor:
    """Sines and cosines of ``t`` ``[B]``, ``[B, size]`` float32."""
    frequencies = torch.logspace(0, 2, size // 2, device=t.device)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)
