"""Prompts as training sees them: encoded once by a pipeline's text encoder, then rows of a data set."""

import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfd_fast.data.dataset import Dataset, NoSamples
from mfd_fast.data.prompt_file import PromptFile
from mfd_fast.data.prompt_store import (
    NEGATIVE,
    PromptIndex,
    PromptRows,
    PromptStore,
    Shard,
    ShardReader,
    pack,
    write_index,
    write_shard,
)
from mfd_fast.pipelines import stored_variant
from mfd_fast.storage import only_writer, read_json, sha256, write_json

PLAN = "encoding.json"
"""What is being encoded, so that another start goes on only with the same."""
ENCODER_PARTS = ("tokenizer", "text_encoder")


def prompts(root: Path, held_out: int = 16, latents: list[int] | None = None) -> Dataset:
    """Encoded prompts as conditions; there are no samples.

    Args:
        root: folder of ``mfd-fast encode-prompts``.
        held_out: prompts at the end that are not trained on but looked at; at most half of all.
        latents: shape of a sample ``[C, H, W]`` (default: the pipeline's).

    Raises:
        FileNotFoundError: the folder has no index.
        ValueError: damaged files, too few prompts, or no shape.
    """
    store = PromptStore(Path(root))
    total = store.index.prompts
    if total < 2 or held_out < 1:
        raise ValueError(f"at least one prompt to train on and one held out are needed, got {total}, {held_out}")
    shape = store.index.sample_shape if latents is None else tuple(latents)
    if not shape:
        raise ValueError(f"{root} does not say which shape latents have: set data.options.latents to [C, H, W]")
    first = total - min(held_out, total // 2)
    trained, kept = (
        {name: PromptRows(store, name, *part) for name in ("prompt_embeds", "prompt_mask")}
        for part in ((0, first), (first, total))
    )
    return Dataset(
        "prompts",
        NoSamples((first, *shape)),
        None,
        NoSamples((total - first, *shape)),
        None,
        conditions=trained,
        held_out_conditions=kept,
        negative_condition=store.negative(),
    )


class PromptEncoder:
    """The tokenizer and text encoder of a pipeline of SANA on disk; nothing else of it is loaded.

    Args:
        folder: the pipeline.
        dtype: of weights and embeddings.
        device: where it computes.
        instruction: put in front of every prompt but not of the negative one: "none", "pipeline" (what diffusers'
            SanaPipeline puts there by default), or a text.
        max_tokens: longest prompt in tokens.

    Raises:
        ModuleNotFoundError: diffusers or transformers is not installed.
        FileNotFoundError: the folder has no text encoder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        instruction: str = "none",
        max_tokens: int = 300,
    ) -> None:
        try:
            from diffusers import SanaPipeline
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"prompts need diffusers ({error}): pip install 'mfd_fast[sana]'") from error
        missing = [part for part in ENCODER_PARTS if not (folder / part).is_dir()]
        if missing:
            raise FileNotFoundError(f"{folder} is no pipeline with a text encoder: it has no {', '.join(missing)}")
        if max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")
        parts: dict[str, Any] = {"transformer": None, "vae": None, "scheduler": None, "torch_dtype": dtype}
        parts["variant"] = stored_variant(folder / "text_encoder")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # new versions call it dtype, old ones know only this name
            self._pipeline: Any = SanaPipeline.from_pretrained(folder, **parts, local_files_only=True)
        self._pipeline.text_encoder.to(device)
        self._device, self._max_tokens = torch.device(device), max_tokens
        default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        self._instruction: list[str] | None = {"none": None, "pipeline": default}.get(instruction, [instruction])
        self.description: dict[str, Any] = {
            "configuration": _digest(folder),
            "instruction": instruction,
            "max_tokens": max_tokens,
            "dtype": str(dtype).removeprefix("torch."),
        }
        """What embeddings depend on, as JSON."""

    def encode(self, texts: Sequence[str], *, negative: bool = False) -> tuple[Tensor, Tensor]:
        """``embeds`` ``[n, L, C]`` and ``mask`` ``[n, L]`` on the CPU; without the instruction for negative prompts."""
        with torch.no_grad():
            embeds, mask, _, _ = self._pipeline.encode_prompt(
                list(texts),
                do_classifier_free_guidance=False,
                device=self._device,
                max_sequence_length=self._max_tokens,
                complex_human_instruction=None if negative else self._instruction,
            )
        return embeds.cpu(), mask.cpu()


def encode_prompts(
    file: Path,
    found: PromptFile,
    encoder: PromptEncoder,
    out: Path,
    *,
    sample_shape: tuple[int, ...] | None = None,
    batch_size: int = 16,
    shard_rows: int = 1024,
    progress: Callable[[int], None] = lambda rows: None,
) -> PromptIndex:
    """Encode a prompt file into ``out``; a start after a stop goes on behind the last whole shard.

    Args:
        file: what ``found`` was read from.
        found: the prompts.
        encoder: of a pipeline.
        out: folder for the shards and, in the end, their index.
        sample_shape: of the pipeline's latents, for the index.
        batch_size: prompts per call of the text encoder.
        shard_rows: prompts per file.
        progress: told how many more rows there are.

    Raises:
        ValueError: ``out`` holds other prompts or those of another encoder.
        RuntimeError: another process writes there.
    """
    source = {"name": file.name, "sha256": sha256(file), "broken": len(found.broken)}
    plan = {"source": source, "encoder": encoder.description, "shard_rows": shard_rows}
    with only_writer(out):
        _check_plan(out, plan)
        write_json(out / PLAN, plan)
        negative = pack(*encoder.encode([""], negative=True))
        width, longest = negative["embeds"].shape[1], int(negative["ends"][0])
        shards = []
        for shard, lengths in _shards(found.prompts, encoder, out, batch_size, shard_rows, width, progress):
            shards.append(shard)
            longest = max(longest, lengths)
        index = PromptIndex(
            len(found.prompts),
            width,
            longest,
            tuple(shards),
            write_shard(out, NEGATIVE, negative),
            source,
            encoder.description,
            sample_shape,
        )
        write_index(out, index)
    return index


def _check_plan(out: Path, plan: dict[str, Any]) -> None:
    if (out / PLAN).is_file():
        begun = read_json(out / PLAN)
        if not isinstance(begun, dict):
            raise ValueError(f"{out / PLAN} must hold an object, got {type(begun).__name__}: choose another folder")
        if changed := [
            _difference(name, begun.get(name), plan[name]) for name in plan if begun.get(name) != plan[name]
        ]:
            raise ValueError(
                f"{out} holds other prompts, or was begun in another way ({'; '.join(changed)}): choose another folder"
            )
    elif any(out.iterdir()):
        raise ValueError(f"{out} holds files but no encoded prompts: choose another folder")


def _difference(name: str, before: Any, now: Any) -> str:
    """How an entry of the plan was, and is."""
    if isinstance(before, dict) and isinstance(now, dict):
        return "; ".join(_difference(key, before.get(key), now[key]) for key in now if before.get(key) != now[key])
    return f"{name} was {before!r}, is {now!r}"


def _shards(
    texts: Sequence[str],
    encoder: PromptEncoder,
    out: Path,
    batch_size: int,
    shard_rows: int,
    width: int,
    progress: Callable[[int], None],
) -> Iterator[tuple[Shard, int]]:
    """Each shard and the tokens of its longest prompt; whole files of an earlier start are kept."""
    for first in range(0, len(texts), shard_rows):
        rows = texts[first : first + shard_rows]
        name = f"shard-{first // shard_rows:05d}.safetensors"
        if (out / name).is_file():
            ends = ShardReader(out / name, width).ends
            if len(ends) != len(rows):
                raise ValueError(f"{out / name} has {len(ends)} rows, expected {len(rows)}: delete it to encode again")
            shard = Shard(name, len(rows), sha256(out / name))
            progress(len(rows))
        else:
            tensors = _encoded(rows, encoder, batch_size, progress)
            ends, shard = tensors["ends"], write_shard(out, name, tensors)
        yield shard, int(ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).max())


def _encoded(
    rows: Sequence[str], encoder: PromptEncoder, batch_size: int, progress: Callable[[int], None]
) -> dict[str, Tensor]:
    parts = []
    for at in range(0, len(rows), batch_size):
        batch = rows[at : at + batch_size]
        parts.append(pack(*encoder.encode(batch)))
        progress(len(batch))
    lengths = [part["ends"].diff(prepend=torch.zeros(1, dtype=torch.int64)) for part in parts]
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("embeds", "mask")}
    return {**joined, "ends": torch.cat(lengths).cumsum(0)}


def _digest(folder: Path) -> str:
    """A digest of the encoder's configuration, its tokenizer, and the names and sizes of its weights."""
    digest = hashlib.sha256()
    for part in ENCODER_PARTS:
        for path in sorted((folder / part).iterdir()):
            content = sha256(path) if path.suffix in (".json", ".model", ".txt") else str(path.stat().st_size)
            digest.update(f"{part}/{path.name}:{content}\n".encode())
    return digest.hexdigest()


def latent_shape(folder: Path) -> tuple[int, ...] | None:
    """Shape of the latents that a pipeline's transformer is made for; None if the folder does not say."""
    path = folder / "transformer" / "config.json"
    if not path.is_file():
        return None
    try:
        config = read_json(path)
        return (config["in_channels"], config["sample_size"], config["sample_size"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say which latents its transformer is made for: {error!r}") from error
