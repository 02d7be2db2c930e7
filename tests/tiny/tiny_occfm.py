"""A small checkout of OccFM: the places and names of the real one, with a decoder of one layer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG = """
MODEL:
  EMBEDDING: {NAME: VoxelHeightSemEmbed, NUM_CATE: 18, FEAT_DIM: 3, HEIGHT_NUM: 5}
  DECODER: {NAME: SmallUp, INPUT_CHANNEL: 4, OUT_DIM: 15}
"""
DECODER = """
from torch import nn


class SmallUp(nn.Module):
    def __init__(self, input_channel, out_dim, **kwargs):
        super().__init__()
        self.up = nn.ConvTranspose2d(input_channel, out_dim, 2, 2)

    def forward(self, batch):
        batch["decoded_map"] = self.up(batch["sampled_features"])
        return batch


__all__ = {"SmallUp": SmallUp}
"""


def write_checkout(folder: Path, decoder: str = DECODER, config: str = CONFIG) -> Path:
    package = folder / "forecast" / "models" / "modules" / "decoders"
    package.mkdir(parents=True)
    for parent in (package.parent, package.parent.parent, package.parent.parent.parent):
        (parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text(decoder)
    configs = folder / "tools" / "cfgs" / "compressor_configs"
    configs.mkdir(parents=True)
    (configs / "vae_swin_x4_h16.yaml").write_text(config)
    return folder


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "module.decoder.up.weight": torch.randn(4, 15, 2, 2, generator=generator),
        "module.decoder.up.bias": torch.randn(15, generator=generator),
        "module.embedding.class_embeds.weight": torch.randn(18, 3, generator=generator),
        "module.encoder.x": torch.zeros(1),
    }


def save(folder: Path, **changes: Any) -> Path:
    path = folder / "compressor.ckpt"
    kept = {name: value for name, value in (weights() | changes).items() if value is not None}
    torch.save({"state_dict": kept, "ema_model": None}, path)
    return path
