"""Pipelines of diffusers on disk or in the hub's cache, of which each part is loaded only where it is needed."""

import hashlib
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mfd_fast.storage import read_json

PIPELINES: dict[str, str] = {"sana": "mfd_fast.models.sana:load_network"}
"""By ``model.name``: ``load(folder, dtype) -> nn.Module``, which loads the transformer as a velocity network."""
TEACHER_PARTS = ("transformer", "scheduler")


def load_network(name: str, folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """The transformer of a pipeline's folder as a velocity network, frozen, with weights of ``dtype``; nothing else."""
    module, _, function = PIPELINES[name].partition(":")
    network: nn.Module = getattr(importlib.import_module(module), function)(folder, dtype)
    return network


def find_pipeline(pipeline: str | Path, parts: Sequence[str], *, download: bool = False) -> Path:
    """The folder of a pipeline; nothing is downloaded unless ``download``.

    Args:
        pipeline: a folder, or the id of a repository of the Hugging Face hub, which is looked for in its cache.
        parts: names of the folders, or paths of the files, that are needed.
        download: fetch what the cache lacks.

    Raises:
        FileNotFoundError: it is neither a folder nor in the cache.
    """
    folder = Path(pipeline)
    if folder.is_dir():
        return folder
    words = f"{pipeline} is neither a folder nor a pipeline in the hub's cache"
    if len(folder.parts) != 2 or folder.is_absolute() or folder.parts[0] in (".", ".."):
        raise FileNotFoundError(words)
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"a hub id needs huggingface_hub ({error}): pip install 'mfd_fast[sana]'") from error
    patterns = ["model_index.json", *(part if "." in Path(part).name else f"{part}/*" for part in parts)]
    try:
        return Path(snapshot_download(str(pipeline), allow_patterns=patterns, local_files_only=not download))
    except (OSError, ValueError) as error:
        hint = "" if download else "; --download fetches it"
        raise FileNotFoundError(f"{words}{hint} ({type(error).__name__})") from error


class FlowSchedule(NamedTuple):
    """How a pipeline's scheduler takes its steps."""

    sampler: str | None
    """The same in `mfd_fast.samplers.SAMPLERS`; None for a scheduler that has no counterpart there."""
    shift: float


def read_schedule(folder: Path) -> FlowSchedule | None:
    """The scheduler of a pipeline's folder; None if there is none.

    Raises:
        ValueError: a damaged file.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    try:
        config: dict[str, Any] = read_json(path)
        shift = float(config.get("flow_shift", config.get("shift", 1.0)))
        name = config.get("_class_name")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the configuration of a scheduler: {error}") from error
    flow = bool(config.get("use_flow_sigmas")) and config.get("prediction_type") == "flow_prediction"
    multistep = name == "DPMSolverMultistepScheduler" and flow and config.get("solver_order", 2) == 2
    return FlowSchedule("dpm++" if multistep else "euler" if name == "FlowMatchEulerDiscreteScheduler" else None, shift)


def weights_digest(module: nn.Module) -> str:
    """A digest of all weights by name, type and value: two modules with the same one compute the same."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}/{value.dtype}/{list(value.shape)}\n".encode())
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


def stored_variant(part: Path) -> str | None:
    """The variant ("bf16", "fp16") of a part's weights where the folder holds nothing else.

    An index of shards is no weights, and has a name like theirs: ``model.safetensors.index.bf16.json``.
    """
    shard = r"(?:-\d+-of-\d+)?"
    matches = [re.fullmatch(rf"\w+{shard}(?:\.(\w+))?{shard}\.safetensors", path.name) for path in part.iterdir()]
    found = {match[1] for match in matches if match is not None}
    return found.pop() if len(found) == 1 else None


def check_schedule(folder: Path, sampler: str, shift: float) -> str | None:
    """A sentence if the pipeline samples in other steps than the student is trained for; None if all is well."""
    schedule = read_schedule(folder)
    if schedule is None or (schedule.sampler, schedule.shift) == (sampler, shift):
        return None
    return (
        f"the pipeline's own scheduler takes other steps ({schedule.sampler or 'unknown'}, shift {schedule.shift:g}) "
        f"than the student is trained for (distill.student_sampler {sampler}, distill.student_shift {shift:g}); "
        f"give diffusers one that fits, see docs/sana.md"
    )
