"""The trained fields that everything is measured on: a teacher of handwritten digits and an auxiliary beside it.

The teacher learns the digits with class labels; the auxiliary is a copy that went on learning from the teacher's own
coarse samples, as the auxiliary of a distillation does. Both are trained once, seeded, and kept in
``benchmarks/fields`` (ignored by git): about five minutes on one core for the DiT, seconds for the MLP.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mfd_fast
from mfd_fast.config import Settings
from mfd_fast.data import load_dataset
from mfd_fast.intervals import LogitNormal
from mfd_fast.methods.mfd import flow_matching_loss
from mfd_fast.models import describe_model
from mfd_fast.run_folder import RunFolder, network_from_description
from mfd_fast.storage import read_json, write_json
from mfd_fast.training.context import make_context
from mfd_fast.training.teacher import train_teacher

FOLDER = Path(__file__).parent / "fields"
NO_LABEL = 10
DRAFT_STEPS = 4
"""Euler steps of the samples that the auxiliary learns from."""

RECIPES: dict[str, list[str]] = {
    # The network of the comparison: 16 tokens, width 256, depth 6, 8 heads, 7.4 million parameters.
    "dit": [
        "model.name=dit", "model.options={width = 256, depth = 6, heads = 8, patch_size = 2}",
        "teacher.updates=900", "teacher.batch_size=64", "teacher.precision=bfloat16", "teacher.ema_decay=0.99",
        "teacher.optimizer.learning_rate=6e-4", "teacher.optimizer.beta2=0.99", "teacher.optimizer.schedule=cosine",
        "teacher.optimizer.warmup_updates=50",
    ],
    "mlp": [
        "model.name=mlp", "model.options={width = 256, depth = 3}", "teacher.updates=1500", "teacher.batch_size=128",
        "teacher.ema_decay=0.99", "teacher.optimizer.learning_rate=4e-3", "teacher.optimizer.schedule=cosine",
        "teacher.optimizer.warmup_updates=50",
    ],
}  # fmt: skip
AUXILIARY_UPDATES = {"dit": 100, "mlp": 200}


class Pair(NamedTuple):
    """Teacher and auxiliary with what is known about their training."""

    teacher: nn.Module
    auxiliary: nn.Module
    record: dict[str, Any]
    """Updates and losses, for the results' file."""


def trained_pair(name: str) -> Pair:
    """The pair ``name`` of `RECIPES`, float32, frozen; trained now if that has not been done yet."""
    folder = FOLDER / name
    if not (folder / "record.json").is_file():
        _train(name, folder)
    run = RunFolder(folder)
    auxiliary = network_from_description(run.read_description("auxiliary"), run.read_tensors("auxiliary"))
    return Pair(run.read_teacher(), auxiliary, read_json(folder / "record.json"))


def _train(name: str, folder: Path) -> None:
    settings = mfd_fast.load_settings(
        "digits-dit", overrides=[*RECIPES[name], "run.threads=1", "run.device=cpu", "run.tensorboard=false"]
    )
    dataset = load_dataset("digits")
    run = RunFolder(folder)
    run.write_settings(settings)
    print(f"training the field {name!r} of the benchmarks, once: {settings.teacher.updates} updates")
    resume = run.teacher_checkpoints().exists()
    teacher = train_teacher(settings, dataset, run, make_context(settings.run), resume=resume)
    auxiliary = _train_auxiliary(teacher, dataset.label, settings, AUXILIARY_UPDATES[name])
    run.write_network("auxiliary", dict(auxiliary.state_dict()), describe_model(auxiliary))
    held_out = {
        "teacher": held_out_loss(teacher, dataset.held_out_x, dataset.held_out_label),
        "auxiliary": held_out_loss(auxiliary, dataset.held_out_x, dataset.held_out_label),
    }
    record = {
        "model": settings.model.options,
        "parameters": sum(parameter.numel() for parameter in teacher.parameters()),
        "updates": {"teacher": settings.teacher.updates, "auxiliary": AUXILIARY_UPDATES[name]},
        "batch_size": settings.teacher.batch_size,
        "training_precision": settings.teacher.precision,
        "held_out_flow_matching_loss": held_out,
        "loss_of_the_zero_field": zero_field_loss(dataset.held_out_x),
    }
    write_json(folder / "record.json", record)  # last: a folder without it is trained anew


def _train_auxiliary(teacher: nn.Module, label: Tensor, settings: Settings, updates: int) -> nn.Module:
    """A copy of the teacher after some updates on its own coarse samples."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(len(label), *teacher.sample_shape, generator=generator)
    drafts = mfd_fast.integrate(teacher, noise, 1.0, 0.0, steps=DRAFT_STEPS, condition={"label": label})
    auxiliary = copy.deepcopy(teacher).requires_grad_(True).train()
    rate = settings.teacher.optimizer.learning_rate / 4
    optimizer = torch.optim.AdamW(auxiliary.parameters(), lr=rate, weight_decay=0.0)
    for _ in tqdm(range(updates), desc="auxiliary", unit="update"):
        index = torch.randint(len(label), (settings.teacher.batch_size,), generator=generator)
        z = torch.randn(len(index), *teacher.sample_shape, generator=generator)
        t = LogitNormal().sample(len(index), generator)
        loss = flow_matching_loss(auxiliary, drafts[index], z, t, {"label": label[index]})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return auxiliary.requires_grad_(False).eval()


def held_out_loss(field: nn.Module, x: Tensor, label: Tensor) -> float:
    """Flow-matching loss on samples that were never trained on, at fixed noise and times."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(x.shape, generator=generator)
    t = LogitNormal().sample(len(x), generator)
    with torch.no_grad():
        return float(flow_matching_loss(field, x, noise, t, {"label": label}))


def zero_field_loss(x: Tensor) -> float:
    """The same loss of a field that is zero everywhere: what training starts from."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    return float((noise - x).square().mean())
