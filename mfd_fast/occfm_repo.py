"""The compressor's decoder out of a user's own checkout of OccFM: latents to occupancy grids.

Nothing of OccFM is part of this package. Its decoder is imported from the folder that the user names, which runs that
folder's code, as the user's own programs do; weights come from a checkpoint that is read as plain tensors.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.data.occupancy import Decoder
from mfd_fast.models.occfm.checkpoint import read_weights

PACKAGE = "forecast"
DECODERS = f"{PACKAGE}.models.modules.decoders"
CONFIGS = "tools/cfgs/compressor_configs"
FRAMES_AT_ONCE = 6
"""Frames that are decoded together; a grid of 200 x 200 x 16 voxels takes 20 MB for its class features."""


def load_decoder(repo: Path, checkpoint: Path, latent_channels: int, device: torch.device) -> Decoder:
    """The decoder for latents of ``latent_channels`` channels.

    Args:
        repo: a checkout of Orbis36/OccFM-NeurIPS2025.
        checkpoint: an OccFM or compressor ``.ckpt`` with weights named ``decoder.*`` and ``embedding.class_embeds``.
        latent_channels: 4, 8, 16 or 64; chooses ``vae_swin_xN_h16.yaml`` of the checkout.
        device: where it computes.

    Raises:
        NotADirectoryError, FileNotFoundError: there is no checkout or checkpoint, or no configuration in it.
        ModuleNotFoundError: the checkout imports something that is not installed.
        ValueError: weights and decoder do not fit each other.
    """
    config = _read_config(repo, latent_channels)["MODEL"]
    weights = read_weights(checkpoint)
    with _importable(repo):
        try:
            classes: Mapping[str, Any] = importlib.import_module(DECODERS).__all__
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"--occfm-repo: the checkout in {repo} needs {error.name}, which is not installed; its ReadMe lists "
                f"what it needs (einops, einops_exts, easydict among it)",
                name=error.name,
            ) from error
    options = {name.lower(): value for name, value in config["DECODER"].items()}
    name = options.pop("name")
    if name not in classes:
        raise ValueError(f"--occfm-repo: {repo} has no decoder {name!r}, it has {', '.join(classes)}")
    decoder: nn.Module = classes[name](**options)
    prefix = "decoder."
    mine = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    features = weights.get("embedding.class_embeds.weight")
    if not mine or features is None:
        raise ValueError(f"{checkpoint} holds no compressor: it lacks decoder.* or embedding.class_embeds.weight")
    try:
        decoder.load_state_dict(mine)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit the decoder {name}: {' '.join(str(error).split())}") from error
    return CompressorDecoder(decoder.to(device).eval(), features.to(device), config["EMBEDDING"]["HEIGHT_NUM"])


class CompressorDecoder:
    """Grids of latents: the class whose learned features are most like those that the decoder gives a voxel."""

    def __init__(self, decoder: nn.Module, features: Tensor, height: int) -> None:
        self._decoder, self._features, self._height = decoder, features, height

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Latents ``[n, C, H, W]`` to labels uint8 ``[n, X, Y, Z]`` on the CPU."""
        parts = [self._decode(part.to(self._features.device)) for part in torch.split(latents, FRAMES_AT_ONCE)]
        return torch.cat(parts)

    def _decode(self, latents: Tensor) -> Tensor:
        columns = self._decoder({"sampled_features": latents})["decoded_map"]
        voxels = columns.unflatten(1, (self._height, self._features.shape[1])).permute(0, 3, 4, 1, 2)
        labels: Tensor = (voxels @ self._features.T).argmax(dim=-1)
        return labels.to("cpu", torch.uint8)


def _read_config(repo: Path, latent_channels: int) -> Mapping[str, Any]:
    if not (repo / PACKAGE).is_dir():
        raise NotADirectoryError(f"--occfm-repo: expected a checkout of OccFM with a folder {PACKAGE!r}, got {repo}")
    path = repo / CONFIGS / f"vae_swin_x{latent_channels}_h16.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"--occfm-repo: the checkout has no {path.relative_to(repo)}, for latents of {latent_channels} channels"
        )
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--occfm-repo needs PyYAML: pip install pyyaml", name="yaml") from error
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        content["MODEL"]["DECODER"]["NAME"], content["MODEL"]["EMBEDDING"]["HEIGHT_NUM"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a compressor: {error!r} is missing") from error
    found: Mapping[str, Any] = content
    return found


@contextmanager
def _importable(repo: Path) -> Iterator[None]:
    """Inside, the checkout's package can be imported; ValueError if another one of that name already was."""
    loaded = getattr(sys.modules.get(PACKAGE), "__path__", None)
    if loaded is not None and Path(next(iter(loaded))).resolve() != (repo / PACKAGE).resolve():
        raise ValueError(f"--occfm-repo: a package called {PACKAGE!r} was imported from {next(iter(loaded))} before")
    sys.path.insert(0, str(repo))
    try:
        yield
    finally:
        sys.path.remove(str(repo))
