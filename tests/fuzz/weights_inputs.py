"""Parsers of files that hold data and weights of others: OccFM's, encoded prompts, LoRA files, files of torch."""

import io
import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inputs import Parser, folder, in_file, with_spoilt
from safetensors.torch import save

from mfd_fast.data.occupancy.convert import convert, read_entries, read_order
from mfd_fast.data.occupancy.labels import label_paths, read_labels
from mfd_fast.data.occupancy.store import KINDS, FramesOnDisk
from mfd_fast.data.prompt_store import PromptStore
from mfd_fast.models.diffusers_lora import FILE_NAME, METADATA, read_lora
from mfd_fast.models.occfm.checkpoint import read_weights
from mfd_fast.torch_files import read_torch_file

SCENES = {"scene-0001": 3, "scene-0002": 2}


def entries() -> list[dict[str, Any]]:
    """A cache of latents as OccFM writes it."""
    return [
        {
            "x_sampled": np.full((1, 2, 2, 2), frame, dtype=np.float32),
            "gt_path": [[f"data/gts/{scene}/{scene}-{frame}/labels.npz"]],
            "gt_trajs": np.ones((1, 2), dtype=np.float32),
        }
        for scene, frames in SCENES.items()
        for frame in range(frames)
    ]


def infos() -> dict[str, Any]:
    """The order of its frames."""
    return {"infos": {name: [{"token": f"{name}-{i}", "x": i} for i in range(n)] for name, n in SCENES.items()}}


def pickled(value: object) -> list[bytes]:
    return [pickle.dumps(value, protocol=protocol) for protocol in (2, 4, 5)]


@cache
def converted() -> dict[str, bytes]:
    """A converted split."""
    place = folder() / "converted"
    (place.with_name("latents.pkl")).write_bytes(pickled(entries())[1])
    (place.with_name("infos.pkl")).write_bytes(pickled(infos())[1])
    convert(place.with_name("latents.pkl"), place.with_name("infos.pkl"), place, frames_per_file=3)
    return {path.name: path.read_bytes() for path in place.iterdir()}


def all_frames(place: Path) -> object:
    """Every frame of a split, and the recorded grids that belong to it."""
    frames = FramesOnDisk(place)
    first, values = 0, []
    for scene in frames.scenes:
        values += [frames.read(kind, first, len(scene.tokens)) for kind in KINDS]
        first += len(scene.tokens)
    inside = place.with_name("grids")
    paths = label_paths(inside, frames.scenes)
    assert all(path.resolve().is_relative_to(inside.resolve()) for path in paths), "out of its folder"
    return values


def labels() -> list[bytes]:
    files = []
    for write in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        write(buffer, semantics=np.arange(8, dtype=np.uint8).reshape(2, 2, 2), mask=np.ones(2))
        files.append(buffer.getvalue())
    return files


def torch_files() -> list[bytes]:
    tied = torch.arange(6.0).reshape(2, 3)
    weights = {"decoder.a": tied, "embedding.b": tied[:, :1], "module.c": torch.tensor(3, dtype=torch.int32)}
    files = []
    for value in ({"state_dict": weights, "epoch": 3, "lr": [1e-3, None]}, weights, {"ema_model": weights}):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        files.append(buffer.getvalue())
    return files


@cache
def encoded() -> dict[str, bytes]:
    """Two encoded prompts and the negative one."""
    rows = {"embeds": torch.ones(5, 4), "mask": torch.ones(5, dtype=torch.uint8), "ends": torch.tensor([2, 5])}
    one = {"embeds": torch.ones(1, 4), "mask": torch.ones(1, dtype=torch.uint8), "ends": torch.tensor([1])}
    files = {"shard-00000.safetensors": save(rows), "negative.safetensors": save(one)}
    index = {
        **{"format": 1, "prompts": 2, "width": 4, "longest": 3, "source": {}, "encoder": {}, "sample_shape": [4, 4, 4]},
        "shards": [{"file": "shard-00000.safetensors", "rows": 2, "sha256": "00"}],
        "negative": {"file": "negative.safetensors", "rows": 1, "sha256": "00"},
    }
    return {**files, "index.json": json.dumps(index).encode()}


def all_prompts(place: Path) -> object:
    store = PromptStore(place)
    rows = [store.row(row) for row in range(min(store.index.prompts, 10))]
    return rows, store.negative(), store.dtype


def lora_files() -> list[bytes]:
    layer = "transformer_blocks.0.attn1.to_q"
    pair = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(4, 2)}
    config = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.target_modules": ["to_q"]}
    named = {
        prefix: {f"{prefix}{layer}.{end}": value for end, value in pair.items()} for prefix in ("transformer.", "")
    }
    peft = {f"base_model.model.{name.replace('_A.', '_A.default.')}": value for name, value in named[""].items()}
    return [
        save(named["transformer."], metadata={METADATA: json.dumps(config)}),
        save({**named["transformer."], f"{layer}.alpha": torch.tensor(2.0)}),
        save(peft),
    ]


def lora_folder(content: bytes) -> object:
    place = folder() / "lora"
    place.mkdir(exist_ok=True)
    (place / FILE_NAME).write_bytes(content)
    return read_lora(place)


WEIGHTS_PARSERS = {
    "occfm-latents": Parser(in_file("latents.pkl", read_entries), lambda: pickled(entries())),
    "occfm-infos": Parser(in_file("infos.pkl", read_order), lambda: pickled(infos())),
    "occfm-labels": Parser(in_file("labels.npz", read_labels), labels),
    "occfm-index": with_spoilt(converted, "index.json", all_frames),
    "occfm-frames": with_spoilt(converted, "frames-0000.safetensors", all_frames),
    "torch-file": Parser(in_file("a.ckpt", read_torch_file), torch_files),
    "occfm-checkpoint": Parser(in_file("b.ckpt", read_weights), torch_files),
    "prompt-index": with_spoilt(encoded, "index.json", all_prompts),
    "prompt-shard": with_spoilt(encoded, "shard-00000.safetensors", all_prompts),
    "lora": Parser(lora_folder, lora_files),
}
