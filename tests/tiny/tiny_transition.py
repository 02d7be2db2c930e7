"""A small transition model of OccFM, and inputs for it."""

import math
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.models.occfm import TransitionModel

SMALL: dict[str, Any] = {
    "model_channels": 16,
    "init_3d_conv_channels": 8,
    "channel_multi": [2, 4],
    "attn_dim": 4,
    "temporal_attn_head": 2,
    "spatial_attn_head": 4,
}


def fill_by_name(module: nn.Module) -> Any:
    """Weights by a rule from their names, every one of another size than its neighbours."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("_embed"):
                continue  # fixed features, which the model makes itself
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            spread = 0.5 if value.dim() < 2 else 1.0 / math.sqrt(value[0].numel())
            value.copy_(torch.randn(value.shape, generator=generator) * spread + ("gamma" in name))
    return module.eval()


def small(**changes: Any) -> TransitionModel:
    options = {"frames": 6, "input_size": (8, 8), "trajectory_length": 6, **SMALL, **changes}
    model: TransitionModel = fill_by_name(TransitionModel(4, **options))
    return model


def inputs(rows: int = 2, frames: int = 6, side: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, frames, 4, side, side, generator=generator)
    t = 1000 * torch.rand(rows, generator=generator)
    return x, t, torch.randn(rows, frames, 2, generator=generator)
