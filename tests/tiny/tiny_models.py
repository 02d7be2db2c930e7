"""Tiny random models as the published ones are laid out, and folders of pictures."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIZE = 32
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_clip(folder: Path, *, seed: int = 0, act: str = "quick_gelu") -> Path:
    """A CLIP model of two layers with its processor and a tokenizer of single letters."""
    from transformers import CLIPConfig, CLIPModel

    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = layers | {"vocab_size": 54, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    config = CLIPConfig(
        text_config=text | {"hidden_act": act},
        vision_config=layers | {"image_size": SIZE, "patch_size": 8, "hidden_act": act},
        projection_dim=24,
    )
    model = build(lambda: CLIPModel(config), seed)
    model.save_pretrained(folder)
    write_processor(folder, "CLIPImageProcessor")
    names = ["<|startoftext|>", "<|endoftext|>", *(letter + end for letter in LETTERS for end in ("", "</w>"))]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return folder


def write_dinov2(folder: Path) -> Path:
    """A DINOv2 model of two layers and 16 features with its processor."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=8, mlp_ratio=2
    )
    build(lambda: Dinov2Model(config), 1).save_pretrained(folder)
    write_processor(folder, "BitImageProcessor")
    return folder


def build(make: Callable[[], torch.nn.Module], seed: int) -> torch.nn.Module:
    """The model with weights large enough that pictures and prompts matter."""
    generator = torch.Generator().manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim():
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_processor(folder: Path, kind: str) -> None:
    """A processor that shrinks the shorter side to 40 pixels and cuts out 32 with means and spreads of its own."""
    settings = {
        "image_processor_type": kind,
        **{"do_resize": True, "size": {"shortest_edge": 40}, "resample": 3},
        **{"do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE}, "do_rescale": True},
        **{"do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "do_convert_rgb": True},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def prepared(image: Image.Image, side: int = 40, crop: int = SIZE) -> torch.Tensor:
    """What `write_processor` asks for, in a few lines: ``[3, 32, 32]``."""
    width, height = image.size
    scale = side / min(width, height)
    small = image.convert("RGB").resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (small.width - crop) // 2, (small.height - crop) // 2
    pixels = np.asarray(small.crop((left, top, left + crop, top + crop)), dtype=np.float64) / 255
    return torch.from_numpy((pixels - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.25]).permute(2, 0, 1).float()


def write_pictures(folder: Path, count: int, seed: int = 0, shade: float = 0.0) -> Path:
    """Blurred noise of various sizes as PNG, named 0.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for i in range(count):
        pixels = np.clip(draw.random((6, 5, 3)) + shade, 0, 1) * 255
        Image.fromarray(pixels.astype(np.uint8)).resize((50 + 3 * (i % 4), 60)).save(folder / f"{i}.png")
    return folder


def add_adapters(transformer: Any, names: Sequence[str], **options: Any) -> Any:
    """The transformer with adapters of peft that change what it computes; options are those of ``LoraConfig``."""
    from peft import LoraConfig

    given = {"init_lora_weights": "gaussian", "target_modules": ["to_k", "to_q", "to_v"], **options}
    for name in names:
        transformer.add_adapter(LoraConfig(**given), adapter_name=name)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return transformer
