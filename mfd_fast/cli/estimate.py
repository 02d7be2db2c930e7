"""The command ``mfd-fast estimate``: will it fit, and what takes the memory."""

import argparse
from collections.abc import Iterator

import torch

from mfd_fast.cli.options import add_settings
from mfd_fast.config import DistillSettings, Settings
from mfd_fast.estimate import CARDS, NETWORKS, Estimate, Plan, estimate, seconds, ways_to_fit
from mfd_fast.intervals import sample_pairs
from mfd_fast.settings_io import load_settings
from mfd_fast.streams import make_generator


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    command = commands.add_parser("estimate", help="memory and time of a distillation on GPUs, before you have them")
    add_settings(command)
    command.add_argument("--network", choices=tuple(NETWORKS), help="default: the preset's model")
    command.add_argument("--card", choices=tuple(CARDS), default="3090", help="GPU (default 3090)")
    command.add_argument("--gpus", type=int, default=1, help="number of GPUs (default 1)")
    command.add_argument("--rows", type=int, help="rows of a backward pass on one GPU (default: from the batch size)")
    command.add_argument("--auxiliary", choices=("full", "lora"), help="default: distill.roles")
    command.add_argument("--student", choices=("full", "lora"), help="default: distill.roles")
    command.add_argument("--precision", choices=("float32", "bfloat16", "float16"), help="default: distill.precision")
    command.add_argument("--zero", metavar="STAGE", type=int, choices=(0, 1, 2, 3), help="default: distill.zero_stage")
    command.add_argument("--zero-offload", action="store_true", help="float32 weights and states on the host")
    command.add_argument("--optimizer-bits", type=int, choices=(8, 32), help="of Adam's averages in full roles")
    command.add_argument("--checkpointing", action="store_true", help="blocks computed again in the backward pass")
    command.set_defaults(run_command=run_estimate)


def run_estimate(options: argparse.Namespace) -> int:
    """Print the estimate; 1 if it does not fit."""
    chosen = options.preset or options.settings or options.set
    settings = load_settings(options.preset, options.settings, options.set) if chosen else Settings()
    card, plan = CARDS[options.card], _plan(options, settings.distill, settings.model.name)
    found = estimate(plan)
    for line in _memory(found, options.card):
        print(line)
    for line in _time(plan, options.card, settings.distill):
        print(line)
    if found.fits(card.memory):
        print(f"fits: {found.total:.1f} of {card.memory:g} GiB; the largest term is {found.largest}")
        return 0
    print(f"does not fit: {found.total:.1f} of {card.memory:g} GiB; the largest term is {found.largest}")
    for words, other in ways_to_fit(plan, card.memory):
        print(f"  with {words} it would: {other.total:.1f} GiB")
    return 1


MODELS = {"sana": "sana-1.6b"}
"""What was measured under another name than the model's."""


def _plan(options: argparse.Namespace, settings: DistillSettings, model: str) -> Plan:
    model = MODELS.get(model, model)
    network = options.network or model
    if network not in NETWORKS:
        raise ValueError(f"--network: {network!r} was not measured; there is {', '.join(NETWORKS)}")
    rows = options.rows
    if rows is None and options.network in (None, model):
        parts = options.gpus * settings.accumulation
        if settings.batch_size % parts:
            raise ValueError(
                f"distill.batch_size must be a multiple of gpus x accumulation = {options.gpus} x "
                f"{settings.accumulation}, got {settings.batch_size}; or give --rows"
            )
        rows = settings.batch_size // parts
    stage = settings.zero_stage if options.zero is None else options.zero
    named = network != model  # settings of another network say nothing about its precision
    return Plan(
        network,
        options.auxiliary or settings.roles,
        options.student or settings.roles,
        options.gpus,
        rows or 1,
        options.precision or ("bfloat16" if named else settings.precision),
        stage,
        options.zero_offload or settings.zero_offload,
        options.optimizer_bits or (8 if settings.auxiliary_optimizer.name == "adamw8bit" else 32),
        options.checkpointing or settings.recompute_blocks,
        1 if settings.recompute_steps else settings.grad_steps or settings.student_steps,
    )


def _memory(found: Estimate, card: str) -> Iterator[str]:
    yield f"memory of each {card} in GiB"
    for name, value in found.gpu.items():
        yield f"  {name:12} {value:6.2f}"
    yield f"  {'total':12} {found.total:6.2f}, of it {found.states:.2f} for weights, gradients and optimisers"
    if found.host:
        yield f"memory of the host for each GPU: {found.host:.1f} GiB"


def _time(plan: Plan, card: str, settings: DistillSettings) -> Iterator[str]:
    from mfd_fast.training.teacher import law_from

    t, r = sample_pairs(
        law_from(settings.times), 4096, equal_share=settings.times.equal_share, generator=make_generator(0, "estimate")
    )
    step = settings.rollout.step_size
    steps = settings.rollout.steps or (None if step is None else float(torch.ceil((t - r) / step).double().mean()))
    if steps is None:
        yield "time: an adaptive solver takes as many evaluations as it needs; give rollout.step_size to estimate it"
        return
    guided = settings.guidance_scale != 1.0
    least = seconds(plan, CARDS[card], evaluations=steps, guided=guided, student_steps=settings.student_steps)
    yield f"time of a backward pass of {plan.rows} rows on a {card}, at least (16 bits)"
    yield f"  {'auxiliary':12} {least.auxiliary:6.2f} s"
    yield f"  {'student':12} {least.student + least.rollouts:6.2f} s, of it {least.rollouts:.2f} for {steps:.1f} steps"
