"""From a teacher to a student: `distill` runs the method into a run folder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.config import DistillSettings, Settings
from mfd_fast.data.dataset import Dataset
from mfd_fast.estimate.out_of_memory import named_knobs
from mfd_fast.field_check import failed_call
from mfd_fast.fields import autocast
from mfd_fast.finished import student_description
from mfd_fast.methods.base import Needs
from mfd_fast.models import MODELS, describe_model
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.models.sana import SanaNetwork
from mfd_fast.module_copies import shared_copy
from mfd_fast.pipelines import weights_digest
from mfd_fast.previews import sample_hook
from mfd_fast.run_folder import RunFolder
from mfd_fast.settings_io import lasting_settings
from mfd_fast.streams import derive_seed
from mfd_fast.student import Student
from mfd_fast.task import Task
from mfd_fast.training.checkpoint import latest_checkpoint
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.context import Context, make_context
from mfd_fast.training.distill import DistillTraining, method_from
from mfd_fast.training.loop import LoopOptions, Resume, run_training
from mfd_fast.training.making_roles import DEFAULT_NEEDS, make_roles
from mfd_fast.training.optimizing import PRECISIONS
from mfd_fast.training.requirements import check_derivative, check_runner, check_settings, check_task
from mfd_fast.training.roles import Roles
from mfd_fast.training.starts import begin_from_adapters, given_adapters, note_start
from mfd_fast.training.teacher_weights import low_precision_teacher


def distill(
    teacher: nn.Module,
    settings: Settings,
    data: Dataset | Task,
    run: Path | str,
    *,
    resume: Resume = False,
    factory: str | None = None,
    context: Context | None = None,
) -> Student:
    """Distil ``teacher`` into a one-step or few-step student by the method of ``settings.distill``.

    Args:
        teacher: ``teacher(x, t, **condition) -> velocity`` in the convention of `mfd_fast.path`; it is never changed.
        settings: of the run; its ``distill`` and ``run`` sections are used.
        data: a data set, for its shape and labels, or a `Task`. Its samples are looked at only by methods that need
            data; Mean Flow Distillation needs none.
        run: folder for logs, checkpoints, sample grids and the student; made if it is not there.
        resume: continue from the newest whole checkpoint of the folder, which must be there; "auto" starts without.
        factory: ``package.module:name`` that builds the teacher again, for one that is not of this package.
        context: device and processes, if the caller has chosen them already.

    Returns:
        The student, with averaged weights if ``distill.ema_decay`` asks for them.

    Raises:
        ValueError: settings that do not fit each other or the checkpoint; a teacher that cannot be called on the task.
        mfd_fast.training.interrupts.Interrupted: a signal or the time limit; it is saved and ``resume=True`` continues.
        FloatingPointError: gradients stayed non-finite.

    Source: arXiv 2606.11155.
    """
    context = context or make_context(settings.run)
    folder = RunFolder(Path(run))
    if not resume and folder.distill_checkpoints().exists():
        raise ValueError(f"{folder.path} already holds a distillation: pass resume=True, or choose another folder")
    task = data if isinstance(data, Task) else Task.from_dataset(data, teacher)
    needs = method_from(settings.distill).needs
    check_all(needs, settings.distill, task, teacher, context)
    network = network_description(teacher, factory)
    if "pipeline" not in network and context.world.is_main and folder.has_network("teacher"):
        check_same_teacher(folder, teacher)
    seed = settings.run.seed
    frozen = frozen_copy(teacher, context)
    if "factory" in network or "class" in network:
        check_call(frozen, task, settings.distill, context.device)
    roles = make_roles(frozen, settings.distill, derive_seed(seed, "distill/init", 0), needs, context)
    begun = begin_roles(roles, settings.distill, folder.distill_checkpoints(), resume)
    student = make_student(roles, task, settings.distill, context.device, needs)
    samples = task.samples if needs.data else None
    conditions = ConditionTable(task.conditions, task.negative_condition, seed, samples)
    if needs.derivative:
        check_derivative(student, conditions, exact=settings.distill.precision == "float32")
    hook = sample_hook(folder, task, seed) if context.world.is_main and settings.distill.sample_every else None
    low = low_precision_teacher(frozen, settings.distill, folder.path)
    with named_knobs(settings.distill, context.world.size):  # compiling is the first forward and backward pass
        training = DistillTraining(roles, student, conditions, settings.distill, seed, context, hook, low)
    if context.world.is_main:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_settings(settings)
        if begun and not folder.distill_checkpoints().exists():
            note_start(folder.path, begun)
        if "pipeline" not in network and not folder.has_network("teacher"):
            folder.write_network("teacher", dict(teacher.state_dict()), network)
    options = loop_options(settings, folder, training, network, resume, context)
    with named_knobs(settings.distill, context.world.size):
        run_training(training, options, context.world)
    training.settle_student()
    state = roles.state_dict("student")
    if context.world.is_main:
        folder.write_network("student", state, student_description(network, task, settings.distill, needs))
    context.world.barrier()
    return student


def loop_options(
    settings: Settings,
    folder: RunFolder,
    training: DistillTraining,
    network: dict[str, Any],
    resume: Resume,
    context: Context,
) -> LoopOptions:
    """Where and how the loop of a distillation runs; ``network`` describes the teacher."""
    seed = settings.run.seed
    return LoopOptions(
        log=folder.path / "log.jsonl",
        checkpoints=folder.distill_checkpoints(),
        tensorboard=folder.path / "tensorboard" / "distill" if settings.run.tensorboard else None,
        keep=settings.distill.keep_checkpoints,
        seed=seed,
        max_skipped=settings.distill.max_skipped_updates,
        exactness=context.exactness() | training.exactness(),
        fingerprint={"distill": lasting_settings(settings.distill), "seed": seed, "network": network},
        resume=resume,
        deadline=context.deadline,
    )


def check_all(needs: Needs, settings: DistillSettings, task: Task, teacher: nn.Module, context: Context) -> None:
    """Raise ValueError if method, settings, task, teacher and machine do not fit each other."""
    check_fit(settings, task, teacher)
    check_settings(needs, settings, context.world.size)
    check_runner(settings, context.device)
    check_task(needs, settings.method, teacher, task.samples, task.negative_condition)


def check_fit(settings: DistillSettings, task: Task, teacher: nn.Module) -> None:
    """Raise ValueError if this teacher cannot be distilled with these settings."""
    if settings.guidance_scale != 1.0 and task.negative_condition is None:
        raise ValueError(
            f"distill.guidance_scale is {settings.guidance_scale} but the teacher has no negative condition; "
            f"set it to 1.0 or give the task a negative_condition"
        )
    low = {parameter.dtype for parameter in teacher.parameters()} & {torch.bfloat16, torch.float16}
    if low and PRECISIONS[settings.precision] is None:
        name = str(low.pop()).removeprefix("torch.")
        raise ValueError(f"the teacher's weights are {name}: set distill.precision to {name}, got {settings.precision}")


def check_call(teacher: nn.Module, task: Task, settings: DistillSettings, device: torch.device) -> None:
    """Raise ValueError if a user's teacher does not give a velocity for samples and conditions of the task.

    Without this the first error would come from somewhere inside the method, and in torch's words.
    """
    x = torch.zeros(2, *task.sample_shape, device=device)
    t = torch.tensor([0.25, 0.75], device=device)
    condition = {name: rows[torch.arange(2) % len(rows)].to(device) for name, rows in task.conditions.items()}
    try:
        with torch.no_grad():
            velocity = autocast(teacher, PRECISIONS[settings.precision])(x, t, **condition)
    except torch.OutOfMemoryError:
        return  # the run meets it, too, and says what needs less
    except Exception as error:
        if torch.are_deterministic_algorithms_enabled():  # torch refuses operations that cannot repeat themselves
            raise
        raise ValueError(
            f"the teacher does not fit the data, whose samples are {list(task.sample_shape)} (data.name, or Task): "
            f"{failed_call(x, t, condition, error)}"
        ) from error
    if not isinstance(velocity, Tensor) or velocity.shape != x.shape:
        got = list(velocity.shape) if isinstance(velocity, Tensor) else type(velocity).__name__
        raise ValueError(f"the teacher must return a velocity of the shape of x, {list(x.shape)}, got {got}")


def check_same_teacher(folder: RunFolder, teacher: nn.Module) -> None:
    """Raise ValueError if the folder's teacher, which its student will be compared with, has other weights."""
    kept = folder.read_tensors("teacher")
    given = {name: value.detach().cpu() for name, value in teacher.state_dict().items()}
    if kept.keys() != given.keys() or not all(torch.equal(kept[name], given[name]) for name in kept):
        raise ValueError(f"{folder.path} holds another teacher than the one given: choose another folder")


def begin_roles(roles: Roles, settings: DistillSettings, checkpoints: Path, resume: Resume) -> dict[str, Any]:
    """`begin_from_adapters`, unless a checkpoint has the adapters: then their files may be gone."""
    if not given_adapters(settings) or resume is True or (resume and latest_checkpoint(checkpoints)[0] is not None):
        return {}
    return begin_from_adapters(roles, settings)


def frozen_copy(teacher: nn.Module, context: Context) -> nn.Module:
    """The teacher in evaluation mode on the run's device, with the main process's weights; the module itself stays as
    it is, and on its own device the copy shares its memory.
    """
    copied = shared_copy(teacher).to(context.device).eval()
    context.world.broadcast([value for value in copied.state_dict().values() if value.is_floating_point()])
    return copied


def make_student(
    roles: Roles, task: Task, settings: DistillSettings, device: torch.device, needs: Needs = DEFAULT_NEEDS
) -> Student:
    """The student of a distillation."""
    return Student(
        autocast(roles.student, PRECISIONS[settings.precision]),
        task.sample_shape,
        settings.student_steps,
        settings.student_shift,
        settings.grad_steps,
        task.label_counts,
        device,
        task.value_range,
        task.needed_conditions,
        settings.student_gamma,
        needs.second_time,
        settings.student_sampler,
        settings.recompute_steps,
    )


def network_description(module: nn.Module, factory: str | None) -> dict[str, Any]:
    """How to build a network again: by name, by factory, or only by its own code (its class is noted)."""
    path = f"{type(module).__module__}:{type(module).__qualname__}"
    if factory is not None:
        return {"factory": factory}
    if isinstance(module, SanaNetwork):
        return {"pipeline": module.pipeline, "weights": weights_digest(module)}
    if isinstance(module, VelocityNetwork) and path in MODELS.values():
        return describe_model(module)
    return {"class": path}
