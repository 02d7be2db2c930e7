"""What a method needs is there: checked before a run, each message with the setting that helps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mfd_fast.config import DistillSettings
from mfd_fast.methods.base import Needs
from mfd_fast.methods.derivative import total_derivative
from mfd_fast.models import MODELS
from mfd_fast.rollout.runners import WHY_NOT
from mfd_fast.streams import Share, make_generator, standard_normal
from mfd_fast.student import Student
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.types import Rows


def check_settings(needs: Needs, settings: DistillSettings, processes: int = 1) -> None:
    """Raise ValueError where the settings of a distillation do not fit its method."""
    method = f"distill.method {settings.method!r}"
    if not needs.teacher and settings.guidance_scale != 1.0:
        raise ValueError(
            f"{method} learns from data alone, so distill.guidance_scale must be 1.0; got {settings.guidance_scale}"
        )
    if settings.roles != "full" and (needs.second_time or needs.random_start):
        kind = "has a second time" if needs.second_time else "begins at random"
        raise ValueError(f"{method} trains a network that {kind}: set distill.roles to full, got {settings.roles!r}")
    if settings.roles != "full" and needs.same_weights:
        raise ValueError(
            f"{method} moves the auxiliary's weights towards the student's, and the mean of low-rank factors is not "
            f"the factors of a mean: set distill.roles to full, or distill.method_options.ida_decay to 1"
        )
    if needs.renoising and settings.student_steps > 1 and settings.student_gamma != 1.0:
        raise ValueError(
            f"{method} trains students of several steps that put fresh noise between them: set distill.student_gamma "
            f"to 1.0, got {settings.student_gamma}"
        )
    if not needs.auxiliary and settings.compile == "on":
        raise ValueError(
            f"{method} has no auxiliary, and only updates with one are compiled: set distill.compile to auto"
        )
    if settings.teacher_weights != "float" and settings.method != "mfd":
        raise ValueError(
            f"distill.teacher_weights {settings.teacher_weights!r} is for distill.method 'mfd', by whose mean "
            f"velocities it is measured: set it to float, got method {settings.method!r}"
        )
    if settings.zero_stage:
        check_sharding(needs, settings)
    rows = needs.rows_multiple * settings.accumulation * processes
    if needs.rows_multiple > 1 and settings.batch_size % rows:
        raise ValueError(
            f"{method} compares groups of {needs.rows_multiple} samples: distill.batch_size must be a multiple of "
            f"{needs.rows_multiple} x accumulation x processes = {rows}, got {settings.batch_size}"
        )


def check_runner(settings: DistillSettings, device: torch.device) -> None:
    """Raise ValueError where the runner of the settings' rollouts can execute nothing on ``device``."""
    runner = settings.rollout.runner
    if runner in WHY_NOT and (why := WHY_NOT[runner](device)) is not None:
        raise ValueError(f"distill.rollout.runner {runner!r} is not possible here: {why}; set it to auto")


def check_sharding(needs: Needs, settings: DistillSettings) -> None:
    """Raise ValueError where shared-out weights cannot do what the method or the other settings ask for."""
    if settings.roles == "lora" or (settings.roles == "lora-student" and not needs.auxiliary):
        raise ValueError(
            "distill.zero_stage shares out whole networks, and LoRA roles are too small for it to bring anything: set "
            "distill.zero_stage to 0, and each process computes its part of the batch"
        )
    if settings.teacher_weights != "float":
        raise ValueError("distill.teacher_weights keeps the whole teacher beside a copy: set it to float for ZeRO")
    if settings.compile == "on":
        raise ValueError("distill.compile is on, but DeepSpeed's hooks cannot be compiled: set distill.compile to auto")
    whole_student = settings.roles == "full"
    if settings.recompute_steps and whole_student:
        raise ValueError("distill.recompute_steps runs an engine inside of its backward pass: set it to false for ZeRO")
    optimizers = {"auxiliary": settings.auxiliary_optimizer, "student": settings.student_optimizer}
    for role in optimizers if whole_student else ("auxiliary",):
        if optimizers[role].name == "adamw8bit":
            raise ValueError(
                f"DeepSpeed flattens weights, which moments of 8 bits do not follow: set distill.{role}_optimizer.name "
                f"to adamw for ZeRO"
            )
    wanted = {
        "a discriminator": needs.discriminator is not None,
        "a forward-mode derivative": needs.derivative,
        "weights of one role moved towards the other's": needs.same_weights,
        "a slowly moving target": needs.target_decay > 0,
    }
    if found := [words for words, needed in wanted.items() if needed]:
        raise ValueError(
            f"distill.method {settings.method!r} needs {' and '.join(found)}, which does not work with "
            f"distill.zero_stage {settings.zero_stage}: set it to 0"
        )


def check_task(
    needs: Needs,
    name: str,
    teacher: nn.Module,
    samples: Rows | None,
    negative_condition: Mapping[str, Tensor] | None,
) -> None:
    """Raise ValueError where the data or the teacher lack what the method called ``name`` needs."""
    method, kind = f"distill.method {name!r}", type(teacher).__name__
    if needs.data and samples is None:
        raise ValueError(
            f"{method} needs real samples: pass a data set, or Task(samples=...). mfd, vsd and reflow need none"
        )
    if needs.negative_condition and negative_condition is None:
        raise ValueError(
            f"{method} draws the teacher's guidance from a range, but the teacher has no negative condition"
        )
    if needs.discriminator and not (hasattr(teacher, "features") and hasattr(teacher, "feature_width")):
        raise ValueError(
            f"{method} needs features for its discriminator: give {kind} a method features(x, t, **condition) -> "
            f"[B, feature_width] and the attribute feature_width, or set distill.method_options.gan_weight to 0"
        )
    if needs.second_time and not hasattr(teacher, "with_second_time"):
        raise ValueError(
            f"{method} trains a network u(x, t, r): give {kind} a method with_second_time() that returns a copy which "
            f"also takes r, or use a method with one time: mfd, vsd, dmd2, senseflow, cd, reflow"
        )
    path = f"{type(teacher).__module__}:{type(teacher).__qualname__}"
    if needs.random_start and path not in MODELS.values():
        raise ValueError(
            f"{method} can begin at random with {', '.join(MODELS)} only, not with {kind}: set "
            f"distill.method_options.start to teacher"
        )


def check_derivative(student: Student, conditions: ConditionTable, *, exact: bool) -> None:
    """Raise ValueError or RuntimeError unless a forward-mode derivative goes through the student's whole network.

    An operation without such a derivative may raise, or drop the tangent without a word; the first is seen here, the
    second is found by comparison with a finite difference if ``exact``, that is in float32.
    """
    device, rows = torch.device(student.device), 4
    x = standard_normal((rows, *student.sample_shape), make_generator(0, "requirements")).to(device)
    t = torch.linspace(0.2, 0.8, rows, device=device)
    condition = conditions.draw(0, Share(rows, 0, rows), device)
    r = t / 2 if student.second_time else None
    velocity = torch.ones_like(x)
    _, derivative = total_derivative(student.field, x, t, velocity, condition, r=r)
    if not exact:
        return
    _, difference = total_derivative(student.field, x, t, velocity, condition, r=r, kind="finite-difference")
    error, size = (derivative - difference).norm().item(), difference.norm().item()
    if error > 0.2 * size + 1e-2 * x.numel() ** 0.5:
        raise ValueError(
            f"the forward-mode derivative of the student's network is wrong (it differs by {error:.2g} from a finite "
            f"difference of size {size:.2g}): an operation of the network loses it. Set "
            f"distill.method_options.derivative to finite-difference"
        )
