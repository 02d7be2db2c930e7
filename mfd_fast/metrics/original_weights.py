"""Names of weights in checkpoints that were not written by transformers, turned into its names."""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

_OPEN_CLIP_BLOCK = (
    (r"ln_(\d)", r"layer_norm\1"),
    (r"attn\.out_proj", "self_attn.out_proj"),
    (r"mlp\.c_fc", "mlp.fc1"),
    (r"mlp\.c_proj", "mlp.fc2"),
)
_OPEN_CLIP = (
    (r"visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.", "text_model.final_layer_norm."),
    (r"transformer\.resblocks\.", "text_model.encoder.layers."),
)
_OPEN_CLIP_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}

_BLIP_VISION = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
)


def open_clip_to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an OpenCLIP ViT model under the names of ``transformers.CLIPModel``.

    OpenCLIP keeps query, key and value in one matrix and its projections transposed. A buffer (``attn_mask``) is left
    out; names that are not known stay, so that loading reports them.
    """
    return dict(pair for name, value in weights.items() for pair in _open_clip_entry(name, value))


def _open_clip_entry(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name == "attn_mask":
        return
    if name in _OPEN_CLIP_PROJECTIONS:
        yield _OPEN_CLIP_PROJECTIONS[name], value.T.contiguous()
        return
    new = name
    for pattern, replacement in _OPEN_CLIP:
        if re.match(pattern, name):
            new = re.sub("^" + pattern, replacement, name)
            break
    if "resblocks" in name:
        for pattern, replacement in _OPEN_CLIP_BLOCK:
            new = re.sub(pattern, replacement, new)
    if fused := re.match(r"(.*)attn\.in_proj_(weight|bias)$", new):
        for role, part in zip("qkv", value.chunk(3), strict=True):
            yield f"{fused[1]}self_attn.{role}_proj.{fused[2]}", part.contiguous()
        return
    yield new, value


def blip_vision_to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of BLIP's own vision transformer under the names of ``transformers.BlipVisionModel``."""
    renamed = {}
    for name, value in weights.items():
        new = name
        for pattern, replacement in _BLIP_VISION:
            new = re.sub(pattern, replacement, new)
        renamed[new] = value
    return renamed


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with ``prefix``, without it."""
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
