"""Networks that matter on a GPU, with random weights: SANA 1.6B and OccFM's transition model.

Only sizes are taken over: time, memory and launches depend on them, not on what the weights say.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfd_fast.models import build_model
from mfd_fast.models.lora import LoRARoles

SANA_TARGETS = ("to_q", "to_k", "to_v")
"""Layers that the released script adapts."""


class Case(NamedTuple):
    """A network with what it is called with."""

    name: str
    roles: Callable[[torch.device, int], tuple[LoRARoles, LoRARoles]]
    """Roles in bfloat16 with adapters of a rank: as this package runs them, and with the network's own forward."""
    sample_shape: tuple[int, ...]
    condition: Callable[[int], dict[str, Tensor]]
    """Condition of so many rows, on the CPU."""
    negative: dict[str, Tensor]
    """What guidance pushes away from, one row."""
    student_steps: int
    frames: int = 0
    """Frames of a sample, for forecasts, whose student and teacher are also timed in frames per second."""


def sana_case(toy: bool) -> Case:
    """SANA 1.6B's transformer: 20 blocks of width 2240, 1024 tokens of 32x32 latents, 300 tokens of text."""
    sizes = SanaSizes(2, 2, 2, 8, 6, 64) if toy else SanaSizes(20, 70, 20, 32, 300, 2304)
    exact = importlib.util.find_spec("diffusers") is not None

    def roles(device: torch.device, rank: int) -> tuple[LoRARoles, LoRARoles]:
        network = _ready(_transformer(sizes) if exact else SanaShaped(sizes), device)
        if not exact:
            made = LoRARoles(network, rank=rank, alpha=rank, targets=SANA_TARGETS)
            return made, made
        from mfd_fast.models.sana import SanaRoles

        own = SanaRoles(network, rank=rank, lora_alpha=rank)
        return own, LoRARoles(OwnForward(network), rank=rank, alpha=rank, targets=SANA_TARGETS)

    def condition(rows: int) -> dict[str, Tensor]:
        mask = torch.ones(rows, sizes.text, dtype=torch.int64)
        return {"prompt_embeds": torch.randn(rows, sizes.text, sizes.text_width), "prompt_mask": mask}

    name = f"SANA {'toy' if toy else '1.6B'} by {'diffusers' if exact else 'a stand-in of its sizes'}"
    negative = {
        "prompt_embeds": torch.zeros(1, sizes.text, sizes.text_width),
        "prompt_mask": condition(1)["prompt_mask"],
    }
    return Case(name, roles, (32, sizes.side, sizes.side), condition, negative, 4)


def occupancy_case(toy: bool) -> Case:
    """OccFM's transition model: six frames to come and six of history, 16 x 50 x 50 each."""
    frames, channels, side = (2, 4, 8) if toy else (6, 16, 50)
    small = {"model_channels": 16, "init_3d_conv_channels": 8, "init_kernel_size": 3, "attn_dim": 8,
             "temporal_attn_head": 2, "spatial_attn_head": 2}  # fmt: skip
    shape = (frames, channels, side, side)

    def roles(device: torch.device, rank: int) -> tuple[LoRARoles, LoRARoles]:
        network = _ready(build_model("occfm", shape, history_frames=frames, **(small if toy else {})), device)
        made = LoRARoles(network, rank=rank, alpha=rank)
        return made, made

    def condition(rows: int) -> dict[str, Tensor]:
        return {"history": torch.randn(rows, *shape), "trajectory": torch.randn(rows, 2 * frames, 2)}

    return Case(
        f"OccFM{' toy' if toy else ''}", roles, shape, condition, {"history": torch.zeros(1, *shape)}, 1, frames
    )


def _ready(network: nn.Module, device: torch.device) -> nn.Module:
    """Frozen, in bfloat16 on the device; layers that begin at zero get weights, so that something is computed."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network.to(device, torch.bfloat16).requires_grad_(False).eval()


class SanaSizes(NamedTuple):
    """What makes a SANA transformer small or large."""

    layers: int
    heads: int
    cross_heads: int
    side: int
    text: int
    text_width: int

    @property
    def width(self) -> int:
        """Features of a token."""
        return 32 * self.heads


def _transformer(sizes: SanaSizes) -> nn.Module:
    from diffusers import SanaTransformer2DModel

    network: nn.Module = SanaTransformer2DModel(
        num_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        attention_head_dim=32,
        num_cross_attention_heads=sizes.cross_heads,
        cross_attention_head_dim=sizes.width // sizes.cross_heads,
        cross_attention_dim=sizes.width,
        sample_size=sizes.side,
        caption_channels=sizes.text_width,
    )
    return network


class OwnForward(nn.Module):
    """diffusers' SANA by its own forward, as a training script calls it."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> Tensor:
        """The velocity at ``x`` ``[B, 32, side, side]``, ``t`` ``[B]``; prompts ``[B, tokens, channels]``."""
        velocity: Tensor = self.transformer(
            x, prompt_embeds.to(x.dtype), encoder_attention_mask=prompt_mask, timestep=t * 1000, return_dict=False
        )[0]
        return velocity


class SanaShaped(nn.Module):
    """The same operations as SANA in the same sizes, for where diffusers is not installed."""

    def __init__(self, sizes: SanaSizes) -> None:
        super().__init__()
        width = sizes.width
        self.enter = nn.Conv2d(32, width, 1)
        self.text = nn.Linear(sizes.text_width, width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(
            SanaBlock(width, sizes.heads, sizes.cross_heads, sizes.side) for _ in range(sizes.layers)
        )
        self.leave = nn.Linear(width, 32)

    def forward(self, x: Tensor, t: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> Tensor:
        """The velocity at ``x`` ``[B, 32, side, side]``, ``t`` ``[B]``; prompts ``[B, tokens, channels]``, no mask."""
        tokens = self.enter(x).flatten(2).transpose(1, 2)
        modulation = self.time(time_features(t, 256).to(x.dtype))
        text = self.text(prompt_embeds.to(x.dtype))
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


def time_features(t: Tensor, size: int) -> Tensor:
    """Sines and cosines of ``t`` ``[B]``, ``[B, size]`` float32."""
    frequencies = torch.logspace(0, 2, size // 2, device=t.device)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)
