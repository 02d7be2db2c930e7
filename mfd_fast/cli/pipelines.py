"""What ``distill`` and ``sample`` do with a pipeline of diffusers: its transformer is the teacher, its VAE decodes."""

import argparse
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.config import Settings
from mfd_fast.pipelines import PIPELINES, TEACHER_PARTS, check_schedule, find_pipeline, load_network
from mfd_fast.run_folder import RunFolder
from mfd_fast.storage import write_file

PICTURES = 36
"""Pictures of held-out prompts unless said otherwise: six rows of six."""
ROWS = 4
"""Pictures that are sampled at once."""


def add_pipeline(parser: argparse.ArgumentParser) -> None:
    """``--pipeline`` and ``--download``."""
    parser.add_argument("--pipeline", metavar="PATH", help="diffusers pipeline: a folder or a hub id (model.pipeline)")
    parser.add_argument("--download", action="store_true", help="fetch a pipeline that is not on this disk")


def with_pipeline(settings: Settings, pipeline: str | None) -> Settings:
    """The settings with the pipeline of the command line.

    Raises:
        ValueError: a network that comes from a pipeline without one, or the other way round.
    """
    if pipeline is not None:
        settings = replace(settings, model=replace(settings.model, pipeline=pipeline))
    name = settings.model.name
    if name in PIPELINES and settings.model.pipeline is None:
        raise ValueError(f"model.name = {name!r} comes from a diffusers pipeline: give --pipeline PATH")
    if name not in PIPELINES and settings.model.pipeline is not None:
        raise ValueError(f"--pipeline needs model.name to be one of {', '.join(PIPELINES)} (--preset), got {name!r}")
    return settings


def refuse_pipeline(settings: Settings) -> None:
    """Raise ValueError if the network of the settings comes trained from a pipeline."""
    if settings.model.name in PIPELINES:
        raise ValueError(
            f"model.name = {settings.model.name!r} comes trained from a diffusers pipeline: "
            f"use mfd-fast distill --pipeline PATH"
        )


def pipeline_teacher(
    settings: Settings, dataset: Any, device: torch.device, *, download: bool
) -> tuple[nn.Module, Any]:
    """The teacher and the task of a distillation from a pipeline; only the transformer is loaded.

    Raises:
        FileNotFoundError: the pipeline or its VAE is not there.
        ValueError: the prompts were encoded for another pipeline.
    """
    from mfd_fast.models.sana_images import PART, decode_latents
    from mfd_fast.task import Preview, Task
    from mfd_fast.training.optimizing import PRECISIONS

    chosen, pictures = settings.distill, settings.distill.sample_every > 0
    assert settings.model.pipeline is not None, "with_pipeline has seen to that"
    folder = find_pipeline(settings.model.pipeline, (*TEACHER_PARTS, *([PART] if pictures else [])), download=download)
    if pictures and not (folder / PART).is_dir():
        raise FileNotFoundError(f"{folder} has no {PART} for pictures: set distill.sample_every=0 to do without")
    teacher: Any = load_network(settings.model.name, folder, PRECISIONS[chosen.precision])
    rows = dataset.conditions.get("prompt_embeds")
    width = teacher.transformer.config.caption_channels
    if rows is None or rows.shape[-1] != width:
        got = "no prompts" if rows is None else f"embeddings of {rows.shape[-1]}"
        raise ValueError(f"data.root: the transformer wants prompt embeddings of {width} channels, got {got}")
    if words := check_schedule(folder, chosen.student_sampler, chosen.student_shift):
        print(words, flush=True)
    task = Task.from_dataset(dataset, teacher)
    if pictures:
        preview = Preview(dataset.held_out_conditions, partial(decode_latents, folder, device=device))
        task = replace(task, preview=preview)
    return teacher, task


def run_sample_pipeline(options: argparse.Namespace) -> int:
    """Pictures of a student on a pipeline's transformer; text encoder, transformer and VAE are loaded in turn."""
    from tqdm import tqdm

    from mfd_fast.finished import load_student
    from mfd_fast.models.sana_images import PART, decoded_rows
    from mfd_fast.training.context import choose_device

    run = RunFolder(options.folder)
    description = run.read_description("student")
    pipeline = options.pipeline or run.read_settings().model.pipeline
    if pipeline is None:
        raise ValueError(f"{run.path}: the student's transformer comes from a pipeline: give --pipeline PATH")
    if options.label is not None:
        raise ValueError("--label: this student has no classes; give --prompts FILE")
    device = choose_device(options.device or "auto", "--device")
    pictures = options.grid is not None or options.images is not None
    parts = [*TEACHER_PARTS, *([PART] if pictures else []), *(["tokenizer", "text_encoder"] if options.prompts else [])]
    folder = find_pipeline(pipeline, parts, download=options.download)
    condition = _conditions(run, folder, options.prompts, options.num, device)
    count = len(next(iter(condition.values())))
    _refuse_leftovers(options.images, count)
    student = load_student(run.path, device=str(device), pipeline=folder)
    missing = [name for name in description["condition_names"] if name not in condition]
    assert not missing, "prompts give all that the pipelines of PIPELINES need"
    with tqdm(total=count, desc="latents", disable=None) as bar:
        latents = student.sample(count, condition, options.seed, batch_size=ROWS, progress=bar.update)
    del student
    if options.out is not None:
        from mfd_fast.evaluation import write_samples

        write_samples(options.out, latents, None)
        print(f"{count} latents in {options.out}")
    if pictures:
        rows = tqdm(decoded_rows(folder, latents, device), total=count, desc="pictures", disable=None)
        write_pictures(rows, options.grid, options.images)
    return 0


def _refuse_leftovers(images: Path | None, count: int) -> None:
    """Raise ValueError if pictures of an earlier command would stay beside ``count`` new ones."""
    kept = [] if images is None else [path.name for path in sorted(images.glob("*.png"))]
    if left := [name for name in kept if not (name[:-4].isdecimal() and int(name[:-4]) < count)]:
        raise ValueError(
            f"--images: {images} holds pictures beside the {count} to be made ({left[0]}): choose another folder"
        )


def write_pictures(pictures: Iterable[Tensor], grid: Path | None, images: Path | None) -> None:
    """Write pictures ``[1, 3, H, W]`` in [-1, 1] as files of their own as they come, then side by side, or both."""
    from mfd_fast.report import save_image_grid
    from mfd_fast.report.grid import encode

    kept, number = [], 0
    for number, picture in enumerate(pictures, 1):
        if images is not None:
            pixels = ((picture[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            write_file(images / f"{number - 1:05d}.png", partial(_write_bytes, encode(pixels, "PNG")))
        if grid is not None:
            kept.append(picture)
    if images is not None:
        print(f"{number} pictures in {images}")
    if grid is not None:
        save_image_grid(grid, torch.cat(kept), columns=math.ceil(math.sqrt(number)), scale=1)
        print(f"picture in {grid}")


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _conditions(
    run: RunFolder, folder: Path, prompts: Path | None, num: int | None, device: torch.device
) -> dict[str, Tensor]:
    """Rows of encoded prompts: all those of a file, else `PICTURES` of those held out in the run.

    With ``num`` so many rows, beginning again at the end of the prompts.
    """
    from tqdm import tqdm

    from mfd_fast.data import load_dataset
    from mfd_fast.data.prompt_file import read_prompts
    from mfd_fast.data.prompt_store import PromptStore, pad
    from mfd_fast.data.prompts import PromptEncoder

    data = run.read_settings().data
    if prompts is None:
        held_out = load_dataset(data.name, data.root, **data.options).held_out_conditions
        index = torch.arange(num or PICTURES) % len(next(iter(held_out.values())))
        return {name: rows[index] for name, rows in held_out.items()}
    found = read_prompts(prompts)
    for line, reason in found.broken:
        print(f"{prompts}, line {line}: {reason}")
    # As the training's prompts were encoded.
    made_by = PromptStore(Path(data.root or ".")).index.encoder
    encoder = PromptEncoder(
        folder,
        dtype=getattr(torch, made_by["dtype"]),
        device=device,
        instruction=made_by["instruction"],
        max_tokens=made_by["max_tokens"],
    )
    texts = found.prompts[:num]
    encoded = (encoder.encode([text]) for text in tqdm(texts, desc="prompts", disable=None))
    rows = [(embeds[0], mask[0]) for embeds, mask in encoded]
    longest = max(int((mask != 0).nonzero()[-1]) + 1 for _, mask in rows)
    padded = pad([(embeds[:longest], mask[:longest]) for embeds, mask in rows], longest)
    return {name: values[torch.arange(num or len(texts)) % len(texts)] for name, values in padded.items()}
