"""ImageReward read into transformers' BLIP against BLIP's own mathematics, written out under its own names."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import build, write_pictures
from torch import Tensor, nn

from mfd_fast.metrics.model_sources import find_source
from mfd_fast.metrics.text_image import METRICS, PreferenceHead

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "red", "dogs", "on", "boat"]
SEEN, READ, SIDE = 192, 128, 32
PROMPTS = ["a cat", "red dogs on a boat", "cat " * 60]


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (-1, 64)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _heads(q) @ _heads(k).transpose(2, 3) / 8
    return (scores.softmax(3) @ _heads(v)).transpose(1, 2).flatten(2)


class _VisionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(SEEN, eps=1e-6), nn.LayerNorm(SEEN, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(SEEN, 3 * SEEN), "proj": nn.Linear(SEEN, SEEN)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(SEEN, 96), "fc2": nn.Linear(96, SEEN)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["proj"](_attend(*self.attn["qkv"](self.norm1(x)).chunk(3, dim=2)))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class _Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, SEEN)), nn.Parameter(torch.zeros(1, 17, SEEN))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, SEEN, 8, 8)})
        self.blocks = nn.ModuleList(_VisionBlock() for _ in range(2))
        self.norm = nn.LayerNorm(SEEN, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def _output(inner: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inner, READ), "LayerNorm": nn.LayerNorm(READ, eps=1e-12)})


def _attention(source: int) -> nn.ModuleDict:
    maps = {"query": nn.Linear(READ, READ), "key": nn.Linear(source, READ), "value": nn.Linear(source, READ)}
    return nn.ModuleDict({"self": nn.ModuleDict(maps), "output": _output(READ)})


class _TextLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.crossattention = _attention(READ), _attention(SEEN)
        self.intermediate, self.output = nn.ModuleDict({"dense": nn.Linear(READ, 80)}), _output(80)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        for part, source in ((self.attention, None), (self.crossattention, seen)):
            maps, out = part["self"], part["output"]
            y = x if source is None else source
            x = out["LayerNorm"](x + out["dense"](_attend(maps["query"](x), maps["key"](y), maps["value"](y))))
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


class _Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(len(WORDS), READ),
                "position_embeddings": nn.Embedding(40, READ),
                "LayerNorm": nn.LayerNorm(READ, eps=1e-12),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_TextLayer() for _ in range(2))})

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        positions = self.embeddings["position_embeddings"].weight[: tokens.shape[1]]
        x = self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](tokens) + positions)
        for layer in self.encoder["layer"]:
            x = layer(x, seen)
        return x


class _ImageReward(nn.Module):
    """With the names of the published file, and some of its weights that scoring does not use."""

    def __init__(self) -> None:
        super().__init__()
        blip = {"visual_encoder": _Vision(), "text_encoder": _Text(), "vision_proj": nn.Linear(SEEN, 8)}
        self.blip = nn.ModuleDict(blip)
        self.mlp = PreferenceHead(READ)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        read = self.blip["text_encoder"](tokens, self.blip["visual_encoder"](pixels))
        return (self.mlp(read[:, 0]) - 0.16717362830052426) / 1.0333394966054072


def _prepared(image: Image.Image) -> Tensor:
    scale = SIDE / min(image.size)
    small = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (small.width - SIDE) // 2, (small.height - SIDE) // 2
    pixels = np.asarray(small.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float64) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1).float()[None]


@pytest.fixture
def model(tmp_path: Path) -> _ImageReward:
    """Also written to ``imagereward`` in the test's folder."""
    folder = tmp_path / "imagereward"
    folder.mkdir()
    model = build(_ImageReward, 3)
    assert isinstance(model, _ImageReward)
    weights = model.state_dict() | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return model


def test_scores(model: _ImageReward, tmp_path: Path) -> None:
    paths = sorted(write_pictures(tmp_path / "pictures", len(PROMPTS)).iterdir())
    images = [Image.open(path).convert("RGB") for path in paths]
    score = METRICS["imagereward"].load(find_source("imagereward", tmp_path), torch.device("cpu"))
    expected = []
    with torch.no_grad():
        scores = score(images, PROMPTS)
        for image, prompt in zip(images, PROMPTS, strict=True):
            ids = [WORDS.index(word) for word in prompt.split()][:33]
            expected.append(model(_prepared(image), torch.tensor([[2, *ids, 3]])))
    assert torch.cat(expected).std() > 1e-3
    torch.testing.assert_close(scores, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_another_file_is_refused(model: _ImageReward, tmp_path: Path) -> None:
    torch.save(model.mlp.state_dict(), tmp_path / "imagereward" / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"has no 'embeddings.patch_embedding.weight': it is not ImageReward's"):
        METRICS["imagereward"].load(find_source("imagereward", tmp_path), torch.device("cpu"))
