"""Where the weights of a metric's models lie: in a folder of the user, or on the hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from mfd_fast.storage import read_tensors
from mfd_fast.torch_files import read_torch_file


@dataclass(frozen=True)
class Source:
    """One metric's models.

    ``model`` and ``processor`` are folders or hub ids as transformers reads them; ``extra`` is a file that transformers
    does not know (a head, an original checkpoint) as (folder or hub id, name), or None.
    """

    metric: str
    model: str
    processor: str
    extra: tuple[str, str] | None = None
    download: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What every ``from_pretrained`` gets."""
        return {"local_files_only": not self.download}


INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
CLIP_L, CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
BERT = "google-bert/bert-base-uncased"

HUB: Mapping[str, Source] = MappingProxyType(
    {
        "clip": Source("clip", CLIP_L, CLIP_L),
        "pickscore": Source("pickscore", "yuvalkirstain/PickScore_v1", CLIP_H),
        "hpsv2": Source("hpsv2", CLIP_H, CLIP_H, ("xswu/HPSv2", "HPS_v2.1_compressed.pt")),
        "aesthetic": Source("aesthetic", CLIP_L, CLIP_L, ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")),
        "imagereward": Source("imagereward", BERT, BERT, ("THUDM/ImageReward", "ImageReward.pt")),
        "dinov2": Source("dinov2", "facebook/dinov2-large", "facebook/dinov2-large"),
        "inception": Source("inception", "", "", ("", INCEPTION_FILE)),
    }
)
"""The published weights of every metric; those of Inception are not on the hub."""

EXTRA_SUFFIXES = (".pt", ".pth", ".safetensors")


def find_source(
    metric: str, models: Path | None = None, chosen: str | None = None, *, download: bool = False
) -> Source:
    """``chosen`` (a folder or hub id), else the folder ``models/METRIC`` if there is one, else the hub.

    A folder holds everything that the metric needs. A hub id replaces the model and keeps the metric's head; HPS has
    none, there it must be a whole model.

    Raises:
        FileNotFoundError: ``chosen`` is neither a folder nor like a hub id, or ``models`` is not a folder.
        ValueError: a folder holds several files that could be the extra one.
    """
    if models is not None and not models.is_dir():
        raise FileNotFoundError(f"--models: there is no folder {models}")
    hub = HUB[metric]
    folder = Path(chosen) if chosen else models / metric if models else None
    if folder is not None and folder.is_dir():
        own = str(folder)
        return Source(metric, own, own, _extra_file(folder) if hub.extra else None, download)
    if chosen and (chosen.count("/") != 1 or chosen.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"{metric}: {chosen} is neither a folder nor the id of a model (OWNER/NAME)")
    extra = None if chosen and metric == "hpsv2" else hub.extra
    return Source(metric, chosen or hub.model, chosen or hub.processor, extra, download)


def missing_weights(source: Source, name: str, error: Exception) -> FileNotFoundError:
    """The error for ``name`` (a folder or hub id) when it does not hold what the metric needs."""
    if Path(name).is_dir():
        reason = " ".join(str(error).split())
        return FileNotFoundError(f"{source.metric}: {name} lacks files of the model: {reason}")
    how = "could not be loaded" if source.download else "is not on this machine"
    advice = "check the network" if source.download else "--download fetches it"
    return FileNotFoundError(
        f"{source.metric}: {name} {how}; {advice}, or put it in a folder {source.metric}/ below --models FOLDER"
    )


def read_extra(source: Source) -> dict[str, Tensor]:
    """The weights in the source's extra file, on the CPU in float32; nothing in the file is executed.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it does not hold weights.
    """
    if source.extra is None:
        reason = f"no file {', '.join(f'*{suffix}' for suffix in EXTRA_SUFFIXES)} beside model.safetensors"
        raise missing_weights(source, source.model, FileNotFoundError(reason))
    owner, name = source.extra
    path = Path(owner) / name if Path(owner).is_dir() else _from_hub(source, owner, name)
    if path.suffix == ".safetensors":
        content: Any = read_tensors(path)
    else:
        content = read_torch_file(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} does not hold weights by name")
    return {key: value.float() if value.is_floating_point() else value for key, value in content.items()}


def _from_hub(source: Source, owner: str, name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError as error:
        from mfd_fast.metrics.image_folder import needs_metrics_extra

        raise needs_metrics_extra(error) from error
    try:
        return Path(hf_hub_download(owner, name, local_files_only=not source.download))
    except (OSError, ValueError) as error:
        raise missing_weights(source, f"{owner}/{name}", error) from error


def _extra_file(folder: Path) -> tuple[str, str] | None:
    """The one file with weights in ``folder`` beside transformers' own ``model.safetensors``."""
    found = sorted(
        path.name for path in folder.iterdir() if path.suffix in EXTRA_SUFFIXES and path.name != "model.safetensors"
    )
    if len(found) > 1:
        raise ValueError(f"{folder}: expected one file of weights beside model.safetensors, got {', '.join(found)}")
    return (str(folder), found[0]) if found else None
