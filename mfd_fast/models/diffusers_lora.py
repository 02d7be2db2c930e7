"""Low-rank roles in and out of diffusers: LoRA files that its pipelines load, and those that its trainers write.

A file holds ``transformer.LAYER.lora_A.weight`` ``[rank, in]`` and ``transformer.LAYER.lora_B.weight`` ``[out, rank]``.
What is written has its scale ``alpha / rank`` in B, and says alpha = rank, so readers of any age get the same weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mfd_fast.models.lora import LoRARoles
from mfd_fast.storage import read_tensors, write_file

FILE_NAME = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file in a folder."""
PREFIX = "transformer."
"""In front of every name; in `mfd_fast.models.sana.SanaNetwork` the transformer has the same name."""
METADATA = "lora_adapter_metadata"
"""Under which diffusers keeps rank and alpha, as JSON."""
A, B = ".lora_A", ".lora_B"
ALPHA_LIMIT = 1e9
"""Above any alpha that makes sense; larger ones, and what is not finite, are damage."""


def lora_for_diffusers(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The tensors of a LoRA file from ``roles.state_dict(role)`` whose adapters are scaled by ``scale``, float32.

    Raises:
        ValueError: layers that do not belong to a transformer.
    """
    strange = [name for name in state if not (name.startswith(PREFIX) and name.endswith((A, B)))]
    if strange or not state:
        raise ValueError(f"expected weights {PREFIX}LAYER.lora_A and lora_B, got {', '.join(strange[:3]) or 'none'}")
    return {f"{name}.weight": tensor.float() * (scale if name.endswith(B) else 1.0) for name, tensor in state.items()}


def write_lora(path: Path | str, state: Mapping[str, Tensor], scale: float) -> Path:
    """Write ``roles.state_dict(role)`` as a LoRA for diffusers and return its file.

    Args:
        path: a ``.safetensors`` file, or a folder, which gets ``pytorch_lora_weights.safetensors``.
        state: weights of the role.
        scale: ``alpha / rank`` of the role.

    Raises:
        ValueError: as `lora_for_diffusers`.
    """
    from safetensors.torch import save_file

    tensors = {name: value.cpu().contiguous() for name, value in lora_for_diffusers(state, scale).items()}
    layers = sorted({name.removeprefix(PREFIX).rpartition(A)[0] for name in tensors if name.endswith(f"{A}.weight")})
    rank = next(len(value) for name, value in tensors.items() if name.endswith(f"{A}.weight"))
    config = {"r": rank, "lora_alpha": rank, "target_modules": layers}
    metadata = {"format": "pt", METADATA: json.dumps({f"{PREFIX}{name}": value for name, value in config.items()})}
    file = lora_file(path)
    write_file(file, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    return file


def save_lora(path: Path | str, roles: LoRARoles, role: str = "student") -> Path:
    """Write a role as a LoRA that ``SanaPipeline.load_lora_weights`` and its like load; returns the file."""
    return write_lora(path, roles.state_dict(role), roles.alpha / roles.rank)


def read_lora(path: Path | str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights by their names in the roles, and the scale of each layer, from a LoRA file of diffusers or peft.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not a plain LoRA of a transformer.
    """
    file = lora_file(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no LoRA file {file}")
    tensors = read_tensors(file)
    state, alphas, strange = {}, {}, []
    for name, value in tensors.items():
        plain = _with_prefix(name.removesuffix(".weight").replace(".default", ""))
        if plain.endswith((A, B)) and value.dim() == 2:
            state[plain] = value.float()
        elif plain.endswith(".alpha") and value.numel() == 1:
            alphas[plain.removesuffix(".alpha")] = value.item()
        else:
            strange.append(name)
    if strange or not state:
        raise ValueError(f"{file} is not a plain LoRA of a transformer: {', '.join(strange[:3]) or 'no lora_A in it'}")
    return state, _scales(state, alphas, _metadata(file), file)


def load_lora(path: Path | str, roles: LoRARoles, role: str = "student") -> None:
    """Let ``role`` begin or go on from a LoRA file; its scale is carried over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file's layers or rank are not those of the roles; nothing is changed then.
    """
    state, scales = read_lora(path)
    if problems := _misfits(state, roles, role):
        raise ValueError(f"{lora_file(path)} does not fit the {role}: {'; '.join(problems)}")
    own = roles.alpha / roles.rank
    roles.load_state_dict(
        role,
        {
            name: value * (scales[name.removesuffix(B)] / own) if name.endswith(B) else value
            for name, value in state.items()
        },
    )


def _misfits(state: Mapping[str, Tensor], roles: LoRARoles, role: str) -> list[str]:
    """What keeps the weights of a file from being those of the role, each in a few words."""
    own = roles.state_dict(role)
    lacking, strange = ([name for name in one if name not in other] for one, other in ((own, state), (state, own)))
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    problems = []
    for names, words in ((lacking, "it lacks"), (strange, "it also adapts")):
        layers = sorted({name.rpartition(".")[0].removeprefix(PREFIX) for name in names})
        if layers:
            shown = ", ".join(layers[:3]) + (", ..." if len(layers) > 3 else "")
            problems.append(f"{words} {len(layers)} of the layers ({shown})")
    if shapes:
        name = shapes[0]
        more = f", and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        problems.append(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}{more}")
    return problems


def save_merged(path: Path | str, roles: LoRARoles, role: str = "student") -> None:
    """Write the whole transformer with the role in its weights, as ``from_pretrained`` reads it.

    Raises:
        TypeError: the backbone is no transformer of diffusers.
    """
    merged: Any = getattr(roles.merged(role), "transformer", None)
    if not hasattr(merged, "save_pretrained"):
        raise TypeError(f"merging needs roles on a transformer of diffusers, got {type(roles.module).__name__}")
    merged.save_pretrained(path)


def lora_file(path: Path | str) -> Path:
    """The file itself, for a file or the folder it lies in."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def _with_prefix(name: str) -> str:
    """A name as the roles have it; trainers write it bare or behind the wrapper of peft."""
    bare = name.removeprefix("base_model.model.").removeprefix(PREFIX)
    return f"{PREFIX}{bare}"


def _metadata(file: Path) -> dict[str, Any]:
    """What diffusers keeps of a LoRA beside its weights; empty for files of others."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(METADATA, "{}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {METADATA} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: {METADATA} must be an object, got {type(found).__name__}")
    return {name.removeprefix(PREFIX): value for name, value in found.items()}


def _scales(
    state: Mapping[str, Tensor], alphas: Mapping[str, float], config: Mapping[str, Any], file: Path
) -> dict[str, float]:
    """``alpha / rank`` by layer: from an alpha of its own, else from the metadata, else 1."""
    if config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError(f"{file}: a LoRA with ranks or scales of its own for some layers is not supported")
    ranks = {name.removesuffix(A): value.shape[0] for name, value in state.items() if name.endswith(A)}
    missing = {name.removesuffix(B) for name in state if name.endswith(B)} ^ ranks.keys()
    if missing:
        raise ValueError(f"{file}: lora_A or lora_B is missing for {', '.join(sorted(missing)[:3])}")
    for layer, rank in ranks.items():
        columns = state[layer + B].shape[1]
        if not rank or columns != rank:
            raise ValueError(f"{file}: {layer} has {rank} rows in lora_A and {columns} columns in lora_B")
    common = config.get("lora_alpha")
    return {layer: _alpha(alphas.get(layer, common), rank, file) / rank for layer, rank in ranks.items()}


def _alpha(value: Any, rank: int, file: Path) -> float:
    """The alpha of a layer as the file has it, or its rank where it has none."""
    if value is None:
        return float(rank)
    if type(value) not in (int, float) or not abs(value) < ALPHA_LIMIT:
        raise ValueError(f"{file}: an alpha must be a number, got {value!r:.80}")
    return float(value)
