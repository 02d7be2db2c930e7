"""A tiny SANA with random weights, for rehearsals of a run without the pipeline."""

from typing import Any

import torch

from mfd_fast.models.sana import SanaNetwork
from mfd_fast.streams import kept_random_state

CHANNELS, SIDE, TEXT_WIDTH = 4, 8, 16
"""Channels and side of its latents, width of its prompt embeddings."""


def tiny_transformer() -> Any:
    """A ``SanaTransformer2DModel`` of two blocks with random weights.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
    """
    try:
        from diffusers import SanaTransformer2DModel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"SANA needs diffusers ({error}): pip install 'mfd_fast[sana]'") from error
    return SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT_WIDTH,
        sample_size=SIDE,
    )


def tiny_network(dtype: torch.dtype | None, seed: int) -> SanaNetwork:
    """`tiny_transformer` with the weights of a seed, frozen, of ``dtype`` (None: float32)."""
    with kept_random_state():
        torch.manual_seed(seed)
        transformer = tiny_transformer()
    for weight in transformer.parameters():  # as one, for `to` of diffusers warns of parts that it does not have
        weight.data = weight.data.to(dtype or torch.float32)
    return SanaNetwork(transformer.eval().requires_grad_(False))
