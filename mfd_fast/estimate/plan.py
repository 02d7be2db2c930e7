"""What an estimate needs to know of a run: who is trained how, on how many GPUs, with how many rows."""

import math
from dataclasses import dataclass

import torch

from mfd_fast.config import DistillSettings, RolloutSettings, SettingError
from mfd_fast.intervals import sample_pairs
from mfd_fast.methods import make_method
from mfd_fast.solvers import SOLVERS
from mfd_fast.streams import make_generator
from mfd_fast.training.distill import method_options
from mfd_fast.training.teacher import law_from

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PAIRS = 4096
"""Drawn pairs (t, r) over which evaluations are averaged; the mean is good to about a percent."""


@dataclass(frozen=True)
class Evaluations:
    """Mean evaluations of a field in one rollout; None where an adaptive solver decides."""

    teacher: float | None
    auxiliary: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run as the formulas see it."""

    auxiliary: str | None
    """"full", "lora", or None for methods without one."""
    student: str
    """"full" or "lora"."""
    rows: int
    """Samples of one process in one backward pass."""
    precision: str = "float32"
    low_teacher: bool = False
    """Whether rollouts have a teacher of 8 bits, a copy beside the other."""
    gpus: int = 1
    zero: int = 0
    """Stage of ZeRO for full roles; low-rank ones are never shared out."""
    offload: bool = False
    optimizer_bits: int = 32
    lora_rank: int = 64
    student_average: bool = False
    student_steps: int = 1
    grad_steps: int = 1
    recompute_steps: bool = False
    recompute_blocks: bool = False
    guided: bool = False
    negative_every: int = 1
    max_rows: int | None = None
    sample_rows: int = 1024
    accumulation: int = 1
    cycle_auxiliary: int = 10
    cycle_student: int = 1
    evaluations: Evaluations = Evaluations(None, None)

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in the networks."""
        return ITEM_BYTES[self.precision]

    @property
    def full_roles(self) -> int:
        """How many networks are trained whole."""
        return (self.auxiliary, self.student).count("full")


def plan_from_settings(settings: DistillSettings, gpus: int) -> Plan:
    """The plan that settings describe, on ``gpus`` GPUs.

    Raises:
        ValueError: a method or solver that does not exist, or a batch that so many GPUs cannot share.
    """
    needs = make_method(settings.method, method_options(settings)).needs
    parts = gpus * settings.accumulation
    if settings.batch_size % parts:
        raise ValueError(
            f"distill.batch_size must be a multiple of gpus x accumulation = {gpus} x {settings.accumulation}, got "
            f"{settings.batch_size}; or give --batch-size"
        )
    names = {settings.student_optimizer.name, *([settings.auxiliary_optimizer.name] if needs.auxiliary else [])}
    return Plan(
        auxiliary=("lora" if settings.roles == "lora" else "full") if needs.auxiliary else None,
        student="full" if settings.roles == "full" else "lora",
        rows=settings.batch_size // parts,
        precision=settings.precision,
        low_teacher=settings.teacher_weights != "float",
        gpus=gpus,
        optimizer_bits=8 if all("8bit" in name for name in names) else 32,
        lora_rank=settings.lora_rank,
        student_average=settings.ema_decay > 0,
        student_steps=settings.student_steps,
        grad_steps=settings.grad_steps or settings.student_steps,
        recompute_steps=settings.recompute_steps,
        recompute_blocks=settings.recompute_blocks,
        zero=settings.zero_stage,
        offload=settings.zero_offload,
        guided=settings.guidance_scale != 1.0,
        negative_every=settings.rollout.negative_every,
        max_rows=settings.rollout.max_rows,
        sample_rows=settings.sample_rows,
        accumulation=settings.accumulation,
        cycle_auxiliary=settings.cycle_auxiliary if needs.auxiliary else 0,
        cycle_student=settings.cycle_student,
        evaluations=mean_evaluations(settings),
    )


def mean_evaluations(settings: DistillSettings) -> Evaluations:
    """Evaluations of a rollout, averaged over the law of its intervals."""
    rollout = settings.rollout
    generator = make_generator(0, "estimate")
    t, r = sample_pairs(law_from(settings.times), PAIRS, generator=generator, equal_share=settings.times.equal_share)
    lengths = (t - r).abs().double()
    return Evaluations(
        _evaluations(lengths, rollout, rollout.solver, rollout.step_size),
        _evaluations(
            lengths,
            rollout,
            rollout.auxiliary_solver or rollout.solver,
            rollout.auxiliary_step_size or rollout.step_size,
        ),
    )


def _evaluations(lengths: torch.Tensor, rollout: RolloutSettings, solver: str, step: float | None) -> float | None:
    if solver not in SOLVERS:
        raise SettingError("distill.rollout.solver", f"must be one of {', '.join(SOLVERS)}; got {solver!r}")
    if rollout.rtol is not None or rollout.atol is not None:
        return None
    if rollout.steps is not None:
        steps = torch.full_like(lengths, rollout.steps)
    elif step is not None:
        steps = torch.ceil(lengths / step - 1e-6)
    else:
        return None
    counts = {int(count): SOLVERS[solver].evaluations(int(count)) for count in steps.unique()}
    each = [min(counts[int(count)] or 1, rollout.max_evaluations or math.inf) for count in steps]
    return sum(each) / len(each)
