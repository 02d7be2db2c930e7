"""The roles that the settings of a distillation ask for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mfd_fast.config import DistillSettings
from mfd_fast.methods.base import Needs
from mfd_fast.models import describe_model, model_from_description
from mfd_fast.models.lora import LoRARoles
from mfd_fast.models.sana import SanaNetwork, SanaRoles
from mfd_fast.streams import kept_random_state
from mfd_fast.training.context import Context
from mfd_fast.training.distill import trained_roles
from mfd_fast.training.roles import TRAINED, FullRoles, Roles, UnlikeRoles
from mfd_fast.training.zero_roles import ZeroRoles

DEFAULT_NEEDS = Needs()


def make_roles(
    teacher: nn.Module,
    settings: DistillSettings,
    seed: int,
    needs: Needs = DEFAULT_NEEDS,
    context: Context | None = None,
) -> Roles:
    """The trained roles as the settings want them: full, whole or shared out in ``context``, low-rank, or both."""
    trained = trained_roles(needs)
    if settings.recompute_blocks:
        if not isinstance(teacher, SanaNetwork):
            raise ValueError(f"distill.recompute_blocks needs a SANA teacher, got {type(teacher).__name__}")
        teacher.checkpoint_blocks = True  # the frozen copy of this run, never the caller's module

    def whole(names: Sequence[str]) -> Roles:
        start = student_start(teacher, needs, seed)
        if settings.zero_stage and context is not None:
            return ZeroRoles(teacher, names, settings, context, student=start)
        return FullRoles(teacher, names, student=start)

    def low_rank(names: Sequence[str]) -> Roles:
        targets: Sequence[str] | None = settings.lora_targets or None
        return low_rank_roles(teacher, settings.lora_rank, settings.lora_alpha, targets, names, seed % 2**31)

    if settings.roles == "lora-student" and "auxiliary" in trained:
        return UnlikeRoles(auxiliary=whole(["auxiliary"]), student=low_rank(["student"]))
    return whole(trained) if settings.roles == "full" else low_rank(trained)


def low_rank_roles(
    teacher: nn.Module,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None,
    roles: Sequence[str] = TRAINED,
    seed: int = 0,
) -> LoRARoles:
    """Low-rank roles on the teacher, of the class that its network has."""
    if isinstance(teacher, SanaNetwork):
        return SanaRoles(teacher, rank=rank, lora_alpha=alpha, targets=targets, roles=roles, seed=seed)
    return LoRARoles(teacher, rank=rank, alpha=alpha, targets=targets, roles=roles, seed=seed)


def student_start(teacher: nn.Module, needs: Needs, seed: int) -> nn.Module:
    """The network a student begins as: the teacher's or a random one, with a second time where the method needs it."""
    start: Any = teacher
    if needs.random_start:
        with kept_random_state():
            torch.manual_seed(seed)
            start = model_from_description(describe_model(start)).to(next(teacher.parameters()).device).eval()
    return start.with_second_time() if needs.second_time else start  # type: ignore[no-any-return]
