"""Scores of pictures by published models: how well they follow a prompt, how much people like them, their features.

Models are read by transformers from a folder or the hub (`mfd_fast.metrics.model_sources`). Pictures are prepared as
the model's own processor says, by Pillow and numpy.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.metrics.image_folder import needs_metrics_extra
from mfd_fast.metrics.inception import Inception, resized
from mfd_fast.metrics.model_sources import INCEPTION_FILE, Source, missing_weights, read_extra
from mfd_fast.metrics.original_weights import below, blip_vision_to_transformers, open_clip_to_transformers

if TYPE_CHECKING:
    from PIL.Image import Image

Scorer = Callable[[Sequence["Image"], Sequence[str]], Tensor]
"""Pictures and their prompts (empty where none are needed) to scores ``[B]`` or features ``[B, F]``."""

PREFERENCE_HIDDEN = (1024, 128, 64, 16)
IMAGE_REWARD_MEAN, IMAGE_REWARD_STD, IMAGE_REWARD_TOKENS = 0.16717362830052426, 1.0333394966054072, 35
BLIP_HEAD_SIZE = 64


class Metric(NamedTuple):
    """One model's way to look at pictures."""

    title: str
    load: Callable[[Source, torch.device], Scorer]
    needs_prompts: bool = False
    gives_features: bool = False
    """Features are compared with those of reference pictures; scores stand alone."""


class PreferenceHead(nn.Module):
    """The head of the LAION aesthetic predictor and of ImageReward: linear layers without activations, ``[N, F]`` to
    ``[N]``. Its weights are called as in the published files, ``layers.0.weight`` and so on (the gaps are dropout)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        sizes = (features, *PREFERENCE_HIDDEN, 1)
        linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        dropped = [part for layer in linear[:3] for part in (layer, nn.Identity())]
        self.layers = nn.Sequential(*dropped, *linear[3:])

    def forward(self, x: Tensor) -> Tensor:
        """The scores."""
        scores: Tensor = self.layers(x).squeeze(1)
        return scores


class Clip:
    """A CLIP model with its processors: unit embeddings of pictures and prompts, ``[N, F]``."""

    def __init__(self, source: Source, device: torch.device, model: Any = None) -> None:
        transformers = _transformers()
        self.model = _read_model(transformers.CLIPModel, source) if model is None else model
        self.model.eval().to(device)
        self.processor = _read(transformers.AutoImageProcessor, source, source.processor, backend="pil")
        self.tokenizer = _read(transformers.AutoTokenizer, source, source.processor)
        self.most_tokens = self.model.config.text_config.max_position_embeddings
        self.device = device

    def of_pictures(self, pictures: Sequence["Image"]) -> Tensor:
        """The embedding of each picture."""
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(self.device)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=1)

    def of_prompts(self, prompts: Sequence[str]) -> Tensor:
        """The embedding of each prompt; longer ones are cut at the model's most tokens."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.most_tokens, return_tensors="pt"
        ).to(self.device)
        pooled = self.model.text_model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=1)

    def cosine(self, pictures: Sequence["Image"], prompts: Sequence[str]) -> Tensor:
        """The cosine ``[N]`` of every picture with its prompt."""
        return (self.of_pictures(pictures) * self.of_prompts(prompts)).sum(1)


def load_clip_score(source: Source, device: torch.device) -> Scorer:
    """``100 max(cosine, 0)``. Source: Hessel et al., arXiv 2104.08718 (with 100 in place of its 2.5, as is usual)."""
    clip = Clip(source, device)
    return lambda pictures, prompts: 100 * clip.cosine(pictures, prompts).clamp_min(0)


def load_pick_score(source: Source, device: torch.device) -> Scorer:
    """The cosine times the model's own scale. Source: Kirstain et al., arXiv 2305.01569."""
    clip = Clip(source, device)
    return lambda pictures, prompts: clip.model.logit_scale.exp() * clip.cosine(pictures, prompts)


def load_hps(source: Source, device: torch.device) -> Scorer:
    """The cosine, from OpenCLIP's checkpoint or a transformers model. Source: Wu et al., arXiv 2306.09341."""
    transformers = _transformers()
    if source.extra is None:
        return Clip(source, device).cosine
    weights = read_extra(source)
    model = transformers.CLIPModel(_read(transformers.CLIPConfig, source, source.model))
    _load(source, model, open_clip_to_transformers(weights))
    return Clip(source, device, model).cosine


def load_aesthetic(source: Source, device: torch.device) -> Scorer:
    """A mark from about 1 to 10. Source: the LAION aesthetic predictor V2 (sac+logos+ava1, linear, MSE)."""
    weights = read_extra(source)
    clip = Clip(source, device)
    head = PreferenceHead(clip.model.config.projection_dim)
    _load(source, head, weights)
    head.eval().to(device)
    return lambda pictures, prompts: head(clip.of_pictures(pictures))


def load_image_reward(source: Source, device: torch.device) -> Scorer:
    """The prompt read by BERT with cross attention to the picture (BLIP), its first token through a head; standardised.

    The sizes are those of the weights. Source: Xu et al., arXiv 2304.05977.
    """
    transformers = _transformers()
    weights = read_extra(source)
    vision, text = _blip(source, weights)
    head = PreferenceHead(text.config.hidden_size)
    _load(source, head, below(weights, "mlp."))
    for module in (vision, text, head):
        module.eval().to(device)
    size = vision.config.image_size
    processor = _clip_processor(transformers, size)
    tokenizer = _read(transformers.AutoTokenizer, source, source.processor)

    def score(pictures: Sequence["Image"], prompts: Sequence[str]) -> Tensor:
        pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(device)
        tokens = tokenizer(
            list(prompts), padding=True, truncation=True, max_length=IMAGE_REWARD_TOKENS, return_tensors="pt"
        ).to(device)
        seen = vision(pixel_values=pixels).last_hidden_state
        read = text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
        ).last_hidden_state
        rewards: Tensor = (head(read[:, 0]) - IMAGE_REWARD_MEAN) / IMAGE_REWARD_STD
        return rewards

    return score


def load_dinov2(source: Source, device: torch.device) -> Scorer:
    """The class token ``[N, F]`` after the last norm. Source: Stein et al., arXiv 2306.04675."""
    transformers = _transformers()
    model = _read_model(transformers.Dinov2Model, source).eval().to(device)
    processor = _read(transformers.AutoImageProcessor, source, source.processor, backend="pil")

    def features(pictures: Sequence["Image"], prompts: Sequence[str]) -> Tensor:
        pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(device)
        tokens: Tensor = model(pixel_values=pixels).last_hidden_state
        return tokens[:, 0]

    return features


def load_inception(source: Source, device: torch.device) -> Scorer:
    """The features ``[N, 2048]`` of FID, from the port's file of weights. Source: Heusel et al., arXiv 1706.08500."""
    if source.extra is None or not source.extra[0]:
        raise FileNotFoundError(
            f"inception: the weights are not on the hub; put them, as {INCEPTION_FILE} or a .safetensors file, into a "
            "folder inception/ below --models FOLDER"
        )
    network = Inception()
    _load(source, network, read_extra(source))
    network.eval().to(device)

    def features(pictures: Sequence["Image"], prompts: Sequence[str]) -> Tensor:
        found: Tensor = network(torch.cat([resized(_pixels(picture).to(device)) for picture in pictures]))
        return found

    return features


def _pixels(picture: "Image") -> Tensor:
    """``[1, 3, H, W]`` in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "clip": Metric("CLIP score", load_clip_score, needs_prompts=True),
        "pickscore": Metric("PickScore", load_pick_score, needs_prompts=True),
        "hpsv2": Metric("HPS v2", load_hps, needs_prompts=True),
        "imagereward": Metric("ImageReward", load_image_reward, needs_prompts=True),
        "aesthetic": Metric("LAION aesthetic score", load_aesthetic),
        "dinov2": Metric("Fréchet distance, DINOv2", load_dinov2, gives_features=True),
        "inception": Metric("Fréchet distance, Inception (FID)", load_inception, gives_features=True),
    }
)


def _blip(source: Source, weights: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """BLIP's vision and text models, of the sizes of ``weights``."""
    transformers = _transformers()
    seen = blip_vision_to_transformers(below(weights, "blip.visual_encoder."))
    read = below(weights, "blip.text_encoder.")
    read.pop("embeddings.position_ids", None)
    try:
        width, _, patch, _ = seen["embeddings.patch_embedding.weight"].shape
        words, hidden = read["embeddings.word_embeddings.weight"].shape
        side = round((seen["embeddings.position_embedding"].shape[1] - 1) ** 0.5) * patch
        vision_config = transformers.BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(seen["encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=_layers(seen, "encoder.layers."),
            num_attention_heads=width // BLIP_HEAD_SIZE,
            image_size=side,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
        text_config = transformers.BlipTextConfig(
            vocab_size=words,
            hidden_size=hidden,
            encoder_hidden_size=width,
            intermediate_size=len(read["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=_layers(read, "encoder.layer."),
            num_attention_heads=hidden // BLIP_HEAD_SIZE,
            max_position_embeddings=len(read["embeddings.position_embeddings.weight"]),
        )
    except KeyError as error:
        raise ValueError(f"{source.metric}: the file of weights has no {error}: it is not ImageReward's") from error
    vision = transformers.BlipVisionModel(vision_config)
    text = transformers.models.blip.modeling_blip_text.BlipTextModel(text_config, add_pooling_layer=False)
    _load(source, vision, seen)
    _load(source, text, read)
    return vision, text


def _layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.split(".")[0]) for name in below(weights, prefix))


def _clip_processor(transformers: Any, size: int) -> Any:
    """CLIP's preparation of pictures at ``size`` pixels, without torchvision whatever is installed."""
    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    return getattr(transformers, name)(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise needs_metrics_extra(error) from error
    return transformers


def _read(kind: Any, source: Source, name: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **source.options, **options)
    except (OSError, ValueError) as error:
        raise missing_weights(source, name, error) from error


def _read_model(kind: Any, source: Source) -> Any:
    """The model with all its weights: transformers fills what a file lacks with random numbers and only warns."""
    try:
        model, report = _read(kind, source, source.model, use_safetensors=True, output_loading_info=True)
    except RuntimeError as error:  # shapes that are not those of config.json
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{source.metric}: the weights of {source.model} do not fit its config.json: {reason}"
        ) from error
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise ValueError(f"{source.metric}: {source.model} lacks {len(lacking)} weights, as {lacking[0]}")
    return model.float()


def _load(source: Source, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        assert source.extra is not None
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{source.metric}: {'/'.join(source.extra)} does not fit the model: {reason}") from error
