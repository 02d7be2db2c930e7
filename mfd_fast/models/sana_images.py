"""Latents of SANA as pictures, by the VAE of a pipeline, which is in memory only while it decodes."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mfd_fast.pipelines import stored_variant

PART = "vae"


def decode_latents(folder: Path, latents: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """All pictures of `decoded_rows` at once, ``[N, 3, H, W]``; errors as there."""
    return torch.cat(list(decoded_rows(folder, latents, device)))


def decoded_rows(folder: Path, latents: Tensor, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """A picture ``[1, 3, H, W]`` float32 in [-1, 1] on the CPU for each of the latents ``[N, C, h, w]`` of a student.

    Rows are decoded one by one in float32, which this VAE needs.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        FileNotFoundError: the pipeline's folder has no VAE.
    """
    try:
        from diffusers import AutoencoderDC
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"decoding needs diffusers ({error}): pip install 'mfd_fast[sana]'") from error
    if not (folder / PART / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no VAE to decode pictures with ({folder / PART})")
    vae = (
        AutoencoderDC.from_pretrained(folder / PART, variant=stored_variant(folder / PART), local_files_only=True)
        .float()
        .to(device)
        .eval()
    )
    scale = vae.config.scaling_factor
    for row in latents.split(1):
        with torch.no_grad():
            picture = vae.decode(row.to(device) / scale, return_dict=False)[0].float().cpu()
        yield picture.clamp(-1, 1)
    del vae
    torch.cuda.empty_cache()  # what the VAE had goes back; nothing without CUDA
