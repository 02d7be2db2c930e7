"""A rehearsal of a run: everything is built and updated as in the run, on tiny stand-ins without data.

A stand-in has the structure of the real thing (the same classes, conditions, roles, optimisers, sampler and method) and
none of its size. A rehearsal finds settings that do not fit each other; it says nothing about quality or speed.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfd_fast.config import DistillSettings, Settings
from mfd_fast.data.dataset import Dataset, NoSamples
from mfd_fast.distillation import distill
from mfd_fast.pipelines import PIPELINES
from mfd_fast.report.record import read_run
from mfd_fast.run_folder import RunFolder
from mfd_fast.training.context import make_context
from mfd_fast.training.distill import method_from
from mfd_fast.training.optimizing import PRECISIONS
from mfd_fast.training.teacher import train_teacher

UPDATES = 2
"""Of the student, and at most so many of the auxiliary before each."""
LARGE_STEP = 0.5
"""At least so long are the steps of a rehearsal's rollouts."""
ROWS = 8
"""Samples and conditions of a stand-in's data."""
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"width": 16, "depth": 2},
    "dit": {"width": 16, "depth": 2, "heads": 2},
    "unet": {"width": 16, "blocks_per_level": 1},
    "occfm": {
        "model_channels": 16, "init_3d_conv_channels": 8, "init_kernel_size": 3, "attn_dim": 8,
        "temporal_attn_head": 1, "spatial_attn_head": 1,
    },
}  # fmt: skip
"""By model the options that make it small; all others stay."""
SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "digits": ((1, 8, 8), 10),
    "cifar10": ((3, 8, 8), 10),
    "gaussian-2d": ((2,), None),
    "mixture-2d": ((2,), None),
    "grid-2d": ((2,), None),
}
"""By dataset the shape of a stand-in's samples, and the classes."""
LATENT = (4, 8, 8)
"""Of a frame of a stand-in for occupancy."""


class Rehearsal(NamedTuple):
    """What a rehearsal did."""

    parameters: int
    """Of the stand-in's teacher."""
    sample_shape: tuple[int, ...]
    student_updates: int
    auxiliary_updates: int
    teacher_updates: int
    """0 where the teacher comes from a pipeline."""
    losses: dict[str, float]
    """Of the last update of each role."""
    seconds: float


def rehearse(settings: Settings) -> Rehearsal:
    """Train a stand-in's teacher, distil it and draw samples, in a folder that is deleted.

    Raises:
        ValueError: settings that do not fit each other, or data that have no stand-in.
        FloatingPointError: a sample of the stand-in is not finite.
    """
    began = time.monotonic()
    small = small_settings(settings)
    dataset, context = stand_in_data(settings), make_context(small.run)
    with tempfile.TemporaryDirectory(prefix="mfd-fast-") as folder:
        run = RunFolder(Path(folder) / "run")
        if settings.model.name in PIPELINES:
            teacher = _pipeline_network(settings)
        else:
            run.path.mkdir()
            run.write_settings(small)
            teacher = train_teacher(small, dataset, run, context)
        student = distill(teacher, small, dataset, run.path, context=context)
        record = read_run(run.path)
    condition = {name: rows[torch.arange(UPDATES)] for name, rows in dataset.conditions.items()}
    samples = student.sample(UPDATES, condition or None)
    if not bool(samples.isfinite().all()):
        raise FloatingPointError("the samples of the stand-in's student are not finite")
    logs = {"teacher": record.teacher_log, "auxiliary": record.auxiliary_log, "student": record.student_log}
    return Rehearsal(
        sum(value.numel() for value in teacher.parameters()),
        tuple(samples.shape[1:]),
        small.distill.student_updates,
        len(record.auxiliary_log) and small.distill.cycle_auxiliary * small.distill.student_updates,
        len(record.teacher_log) and small.teacher.updates,
        {role: float(lines[-1]["loss"]) for role, lines in logs.items() if lines},
        time.monotonic() - began,
    )


def small_settings(settings: Settings) -> Settings:
    """The settings with a small network, the smallest batch that they allow and `UPDATES` updates, on the CPU."""
    distilling = settings.distill
    rows = max(2, method_from(distilling).needs.rows_multiple) * distilling.accumulation
    model, options = settings.model, settings.model.options | SMALL.get(settings.model.name, {})
    return replace(
        settings,
        model=replace(model, options=options if model.name in SMALL else {}, pipeline=None),
        teacher=replace(settings.teacher, updates=UPDATES, batch_size=2, log_every=1, checkpoint_every=0),
        distill=_small(distilling, rows),
        run=replace(settings.run, device="cpu", tensorboard=False, max_seconds=None),
    )


def _small(settings: DistillSettings, rows: int) -> DistillSettings:
    steps = settings.rollout.step_size
    return replace(
        settings,
        rollout=replace(settings.rollout, step_size=None if steps is None else max(LARGE_STEP, steps)),
        student_updates=UPDATES,
        cycle_auxiliary=min(UPDATES, settings.cycle_auxiliary),
        cycle_student=1,
        batch_size=rows,
        sample_rows=min(settings.sample_rows, 2 * rows),
        lora_rank=min(4, settings.lora_rank),
        compile="off",
        zero_stage=0,
        zero_offload=False,
        log_every=1,
        sample_every=0,
        checkpoint_every=0,
    )


def stand_in_data(settings: Settings) -> Dataset:
    """Random rows of the structure of the settings' data.

    Raises:
        ValueError: there is no stand-in for these data.
    """
    generator = torch.Generator().manual_seed(settings.run.seed)
    data = settings.data
    if settings.model.name in PIPELINES:
        return _prompts(generator)
    if data.name in ("occupancy", "occupancy-toy"):
        return _occupancy(settings, generator)
    if data.name not in SHAPES:
        raise ValueError(f"data.name: a dry run has stand-ins for {', '.join(SHAPES)}, occupancy; got {data.name!r}")
    shape, classes = SHAPES[data.name]
    labelled = classes is not None and bool(data.options.get("conditional", True))
    x = torch.randn(ROWS, *shape, generator=generator)
    label = torch.arange(ROWS) % (classes or 1) if labelled else None
    value_range = (-1.0, 1.0) if len(shape) == 3 else None
    return Dataset(data.name, x, label, x.clone(), label, classes if labelled else None, value_range)


def _occupancy(settings: Settings, generator: torch.Generator) -> Dataset:
    options: dict[str, Any] = {"history": 3, "future": 3} if settings.data.name == "occupancy-toy" else {}
    options = {"history": 6, "future": 6} | options | settings.data.options
    history, future = int(options["history"]), int(options["future"])
    x, past = (torch.randn(ROWS, frames, *LATENT, generator=generator) for frames in (future, history))
    conditions = {"history": past, "trajectory": torch.randn(ROWS, history + future, 2, generator=generator)}
    return Dataset(
        settings.data.name, x, None, x.clone(), None, conditions=conditions, held_out_conditions=dict(conditions)
    )


def _prompts(generator: torch.Generator) -> Dataset:
    from mfd_fast.models.sana_stand_in import CHANNELS, SIDE, TEXT_WIDTH

    def encoded(rows: int) -> dict[str, Tensor]:
        lengths = torch.randint(1, 7, (rows, 1), generator=generator)
        embeds = torch.randn(rows, 6, TEXT_WIDTH, generator=generator)
        return {"prompt_embeds": embeds, "prompt_mask": (torch.arange(6) < lengths).long()}

    conditions, nothing = encoded(ROWS), NoSamples((ROWS, CHANNELS, SIDE, SIDE))
    return Dataset(
        "prompts",
        nothing,
        None,
        nothing,
        None,
        conditions=conditions,
        held_out_conditions=dict(conditions),
        negative_condition=encoded(1),
    )


def _pipeline_network(settings: Settings) -> nn.Module:
    from mfd_fast.models.sana_stand_in import tiny_network

    return tiny_network(PRECISIONS[settings.distill.precision], settings.run.seed)
