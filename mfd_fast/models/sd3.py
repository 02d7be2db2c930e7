"""Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206) as a velocity field, on diffusers' `SD3Transformer2DModel`.

Roles: ``LoRARoles(SD3Network(transformer), rank=64, alpha=64, targets=("to_q", "to_k", "to_v"))``; the files of
`mfd_fast.models.diffusers_lora` fit.
"""

from torch import Tensor, nn

TRAINING_TIMES = 1000
"""Times of its scheduler run up to this number."""


class SD3Network(nn.Module):
    """The velocity ``network(x, t, prompt_embeds=..., pooled_prompt_embeds=...)`` of a transformer of SD3.

    ``x`` ``[B, C, H, W]`` latents, ``t`` ``[B]`` in [0, 1], ``prompt_embeds`` ``[B, L, E]``, ``pooled_prompt_embeds``
    ``[B, P]``, as its pipeline encodes prompts.
    """

    time_range = (0.0, 1.0)

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Tensor:
        """The velocity ``[B, C, H, W]``."""
        velocity: Tensor = self.transformer(
            x, prompt_embeds, pooled_prompt_embeds, timestep=t * TRAINING_TIMES, return_dict=False
        )[0]
        return velocity
