"""Scores of tiny random models against the same model called directly, on pictures prepared by hand."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import build, prepared, write_clip, write_dinov2, write_pictures
from torch import Tensor, nn

from mfd_fast.metrics.model_sources import find_source
from mfd_fast.metrics.original_weights import open_clip_to_transformers
from mfd_fast.metrics.text_image import METRICS, PreferenceHead

CPU = torch.device("cpu")
PROMPTS = ["a cat", "two red dogs on a boat that is longer than the model reads", "sea", "x"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as --models takes it."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("clip", "pickscore", "hpsv2", "aesthetic")):
        write_clip(folder / name, seed=seed)
    write_dinov2(folder / "dinov2")
    head = build(lambda: PreferenceHead(24), 5)
    torch.save(head.state_dict(), folder / "aesthetic" / "head.pth")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = write_pictures(tmp_path_factory.mktemp("pictures"), len(PROMPTS))
    return [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]


def _score(name: str, models: Path, images: list[Image.Image], prompts: list[str] = PROMPTS) -> Tensor:
    with torch.no_grad():
        return METRICS[name].load(find_source(name, models), CPU)(images, prompts)


def _tokens(prompt: str) -> Tensor:
    """The letters of the tiny vocabulary: 2 + 2 i, one more at the end of a word; cut to 16 tokens with both ends."""
    ids = [2 + 2 * (ord(c) - 97) + (i == len(word) - 1) for word in prompt.split() for i, c in enumerate(word)]
    return torch.tensor([[0, *ids[:14], 1]])


def _reference(folder: Path, images: list[Image.Image], scaled: bool) -> Tensor:
    """One picture and one prompt at a time through the model's own forward."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder, local_files_only=True)
    rows = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        with torch.no_grad():
            out = model(input_ids=_tokens(prompt), pixel_values=prepared(image)[None])
        rows.append(out.logits_per_image[0, 0] / (1 if scaled else model.logit_scale.exp()))
    return torch.stack(rows).detach()


def test_clip_family(models: Path, images: list[Image.Image]) -> None:
    cosine = _reference(models / "clip", images, scaled=False)
    assert cosine.std() > 0.005
    torch.testing.assert_close(_score("clip", models, images), 100 * cosine.clamp_min(0), rtol=1e-4, atol=2e-4)
    picks = _reference(models / "pickscore", images, scaled=True)
    torch.testing.assert_close(_score("pickscore", models, images), picks, rtol=1e-4, atol=1e-4)
    hps = _reference(models / "hpsv2", images, scaled=False)
    torch.testing.assert_close(_score("hpsv2", models, images), hps, rtol=1e-4, atol=1e-5)


def test_a_picture_is_matched_with_its_own_prompt(models: Path, images: list[Image.Image]) -> None:
    """Permuted pairs give permuted scores, whoever shares the batch; a single pair gives the same."""
    order = [2, 0, 3, 1]
    scores = _score("pickscore", models, images)
    permuted = _score("pickscore", models, [images[i] for i in order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(permuted, scores[order], rtol=1e-4, atol=1e-5)
    swapped = _score("pickscore", models, images, [PROMPTS[i] for i in order])
    assert (swapped - scores).abs().min() > 1e-3
    alone = _score("pickscore", models, images[:1], PROMPTS[:1])
    torch.testing.assert_close(alone, scores[:1], rtol=1e-4, atol=1e-5)


def test_aesthetic_head(models: Path, images: list[Image.Image]) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(models / "aesthetic", local_files_only=True)
    head = torch.load(models / "aesthetic" / "head.pth", weights_only=True)
    assert sorted({int(name.split(".")[1]) for name in head}) == [0, 2, 4, 6, 7]
    with torch.no_grad():
        seen = model.get_image_features(torch.stack([prepared(image) for image in images]))
        values = F.normalize(seen.pooler_output, dim=1)
        for i in (0, 2, 4, 6, 7):
            values = values @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
    scores = _score("aesthetic", models, images, [])
    assert values.std() > 1e-3
    torch.testing.assert_close(scores, values[:, 0], rtol=1e-3, atol=1e-4)


def test_dinov2_features(models: Path, images: list[Image.Image]) -> None:
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(models / "dinov2", local_files_only=True)
    with torch.no_grad():
        expected = model(torch.stack([prepared(image) for image in images])).pooler_output
    torch.testing.assert_close(_score("dinov2", models, images, []), expected, rtol=1e-4, atol=1e-4)


class _OpenClipBlock(nn.Module):
    """A block as OpenCLIP writes it, on torch's own attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 48), "c_proj": nn.Linear(48, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class _OpenClip(nn.Module):
    """A tiny ViT CLIP with the names and the mathematics of OpenCLIP."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        visual = nn.Module()
        visual.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        visual.class_embedding = nn.Parameter(torch.zeros(width))
        visual.positional_embedding = nn.Parameter(torch.zeros(17, width))
        visual.ln_pre, visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        visual.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(_OpenClipBlock(width) for _ in range(2))})
        visual.proj = nn.Parameter(torch.zeros(width, 24))
        self.visual = visual
        self.token_embedding = nn.Embedding(54, width)
        self.positional_embedding = nn.Parameter(torch.zeros(16, width))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(_OpenClipBlock(width) for _ in range(2))})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, 24))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("attn_mask", torch.zeros(16, 16))

    def cosine(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        eye = self.visual
        x = eye.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([eye.class_embedding.expand(len(x), 1, -1), x], 1) + eye.positional_embedding
        x = eye.ln_pre(x)
        for block in eye.transformer["resblocks"]:
            x = block(x, None)
        seen = eye.ln_post(x[:, 0]) @ eye.proj
        n = tokens.shape[1]
        y = self.token_embedding(tokens) + self.positional_embedding[:n]
        for block in self.transformer["resblocks"]:
            y = block(y, torch.full((n, n), -torch.inf).triu(1))
        read = self.ln_final(y)[:, -1] @ self.text_projection
        return F.cosine_similarity(seen, read)


def test_hps_from_an_open_clip_checkpoint(tmp_path: Path, images: list[Image.Image]) -> None:
    model = build(_OpenClip, 7)
    assert isinstance(model, _OpenClip)
    folder = write_clip(tmp_path / "hpsv2", act="gelu")
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, folder / "HPS_v2.1_compressed.pt")
    with torch.no_grad():
        expected = torch.cat(
            [model.cosine(prepared(i)[None], _tokens(p)) for i, p in zip(images, PROMPTS, strict=True)]
        )
    assert expected.std() > 1e-3
    torch.testing.assert_close(_score("hpsv2", tmp_path, images), expected, rtol=1e-4, atol=1e-5)
    converted = open_clip_to_transformers(model.state_dict())
    assert converted.keys() == load_file(folder / "model.safetensors").keys()


def test_a_model_that_lacks_weights_is_refused(models: Path, tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, as visual_projection\.weight"):
        METRICS["clip"].load(find_source("clip", tmp_path), CPU)


def test_a_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "aesthetic")
    with pytest.raises(FileNotFoundError, match=r"aesthetic lacks files of the model: no file .*\*\.pth"):
        METRICS["aesthetic"].load(find_source("aesthetic", tmp_path), CPU)
    save_file(PreferenceHead(23).state_dict(), folder / "head.safetensors")
    with pytest.raises(ValueError, match=r"head.safetensors does not fit the model: .*layers.0.weight"):
        METRICS["aesthetic"].load(find_source("aesthetic", tmp_path), CPU)
    (folder / "head.safetensors").rename(folder / "head.pth")
    with pytest.raises(ValueError, match=r"head.pth is damaged or holds no weights"):
        METRICS["aesthetic"].load(find_source("aesthetic", tmp_path), CPU)
