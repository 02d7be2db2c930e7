"""What ``distill`` and ``sample`` do with a pipeline of diffusers: its transformer is the teacher, its VAE decodes."""

import argparse
import math
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
"""Pictures in a grid unless said otherwise: six rows of six."""
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
    from mfd_fast.finished import load_student
    from mfd_fast.models.sana_images import PART, decode_latents
    from mfd_fast.training.context import choose_device

    run = RunFolder(options.folder)
    description = run.read_description("student")
    pipeline = options.pipeline or run.read_settings().model.pipeline
    if pipeline is None:
        raise ValueError(f"{run.path}: the student's transformer comes from a pipeline: give --pipeline PATH")
    if options.label is not None:
        raise ValueError("--label: this student has no classes; give --prompts FILE")
    device = choose_device(options.device, "--device")
    pictures = options.grid is not None or options.images is not None
    parts = [*TEACHER_PARTS, *([PART] if pictures else []), *(["tokenizer", "text_encoder"] if options.prompts else [])]
    folder = find_pipeline(pipeline, parts, download=options.download)
    count = PICTURES if options.num is None else options.num
    condition = _conditions(run, folder, options.prompts, count, device)
    student = load_student(run.path, device=str(device), pipeline=folder)
    missing = [name for name in description["condition_names"] if name not in condition]
    assert not missing, "prompts give all that the pipelines of PIPELINES need"
    latents = student.sample(count, condition, options.seed, batch_size=ROWS)
    del student
    if options.out is not None:
        from mfd_fast.evaluation import write_samples

        write_samples(options.out, latents, None)
        print(f"{count} latents in {options.out}")
    if pictures:
        write_pictures(decode_latents(folder, latents, device), options.grid, options.images)
    return 0


def write_pictures(pictures: Tensor, grid: Path | None, images: Path | None) -> None:
    """Write ``[N, 3, H, W]`` in [-1, 1] as one picture, as files of their own, or both."""
    from mfd_fast.report import save_image_grid
    from mfd_fast.report.grid import encode

    if grid is not None:
        save_image_grid(grid, pictures, columns=math.ceil(math.sqrt(len(pictures))), scale=1)
        print(f"picture in {grid}")
    if images is not None:
        for number, picture in enumerate(pictures):
            pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            content = encode(pixels, "PNG")
            write_file(images / f"{number:05d}.png", partial(_write_bytes, content))
        print(f"{len(pictures)} pictures in {images}")


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _conditions(
    run: RunFolder, folder: Path, prompts: Path | None, count: int, device: torch.device
) -> dict[str, Tensor]:
    """``count`` rows of encoded prompts, beginning again at their end: of a file, else those held out in the run."""
    from mfd_fast.data import load_dataset
    from mfd_fast.data.prompt_file import read_prompts
    from mfd_fast.data.prompt_store import PromptStore, pad
    from mfd_fast.data.prompts import PromptEncoder

    data = run.read_settings().data
    if prompts is None:
        held_out = load_dataset(data.name, data.root, **data.options).held_out_conditions
        total = len(next(iter(held_out.values())))
        return {name: rows[torch.arange(count) % total] for name, rows in held_out.items()}
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
    texts = found.prompts[:count]
    rows = [(embeds[0], mask[0]) for embeds, mask in (encoder.encode([text]) for text in texts)]
    longest = max(int((mask != 0).nonzero()[-1]) + 1 for _, mask in rows)
    encoded = pad([(embeds[:longest], mask[:longest]) for embeds, mask in rows], longest)
    return {name: values[torch.arange(count) % len(texts)] for name, values in encoded.items()}
