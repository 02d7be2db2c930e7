"""Flux.1 (Black Forest Labs 2024) as a velocity field, on diffusers' `FluxTransformer2DModel`.

Roles: ``LoRARoles(FluxNetwork(transformer), rank=64, alpha=64, targets=("to_q", "to_k", "to_v"))``; the files of
`mfd_fast.models.diffusers_lora` fit. The transformer itself rounds times to the type of its weights.
"""

import torch
from torch import Tensor, nn

PATCH = 2
"""Latents enter as squares of so many pixels a side."""


class FluxNetwork(nn.Module):
    """The velocity ``network(x, t, prompt_embeds=..., pooled_prompt_embeds=..., guidance=None)`` of a transformer.

    ``x`` ``[B, C, H, W]`` latents before packing, H and W even, ``t`` ``[B]`` in [0, 1], ``prompt_embeds``
    ``[B, L, E]``, ``pooled_prompt_embeds`` ``[B, P]``; ``guidance`` ``[B]`` for transformers that take it as an input.
    """

    time_range = (0.0, 1.0)

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The velocity ``[B, C, H, W]``; ValueError for latents of odd height or width."""
        tokens = packed(x)
        output: Tensor = self.transformer(
            tokens,
            prompt_embeds,
            pooled_prompt_embeds,
            timestep=t,
            img_ids=positions(x),
            txt_ids=x.new_zeros(prompt_embeds.shape[1], 3),
            guidance=guidance,
            return_dict=False,
        )[0]
        return unpacked(output, x)


def packed(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` as tokens ``[B, H/2 * W/2, 4 C]``."""
    if x.shape[2] % PATCH or x.shape[3] % PATCH:
        raise ValueError(f"x must have even height and width, got shape {list(x.shape)}")
    squares = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, C, H/2, 2, W/2, 2]
    tokens: Tensor = squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return tokens


def unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens as a picture of the shape of ``like``."""
    _, channels, height, width = like.shape
    squares = tokens.unflatten(2, (channels, PATCH, PATCH)).unflatten(1, (height // PATCH, width // PATCH))
    picture: Tensor = squares.permute(0, 3, 1, 4, 2, 5).reshape(like.shape)
    return picture


def positions(x: Tensor) -> Tensor:
    """Row and column of each token, ``[N, 3]``; the first number is 0."""
    rows, columns = (torch.arange(size // PATCH, device=x.device, dtype=x.dtype) for size in x.shape[2:])
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
