"""From a teacher to a student: `distill` runs the method into a run folder, `load_student` uses what it left there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.config import DistillSettings, Settings
from mfd_fast.data.dataset import Dataset, NoSamples
from mfd_fast.estimate.out_of_memory import named_knobs
from mfd_fast.fields import autocast
from mfd_fast.methods.base import Needs
from mfd_fast.models import MODELS, describe_model, null_condition
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.models.sana import SanaNetwork
from mfd_fast.pipelines import TEACHER_PARTS, find_pipeline, load_network, weights_digest
from mfd_fast.previews import Preview, preview_hook
from mfd_fast.run_folder import RunFolder, build_from_description, with_weights
from mfd_fast.settings_io import lasting_settings
from mfd_fast.sharing import shared_copy
from mfd_fast.streams import derive_seed
from mfd_fast.student import Student
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.context import Context, make_context
from mfd_fast.training.distill import DistillTraining, SampleHook, method_from
from mfd_fast.training.loop import LoopOptions, Resume, run_training
from mfd_fast.training.making_roles import DEFAULT_NEEDS, low_rank_roles, make_roles
from mfd_fast.training.optimizing import PRECISIONS
from mfd_fast.training.requirements import check_derivative, check_runner, check_settings, check_task
from mfd_fast.training.roles import Roles
from mfd_fast.training.starts import begin_from_adapters, note_start
from mfd_fast.training.teacher_weights import low_precision_teacher
from mfd_fast.types import Rows

NEEDED_OF_STUDENT = (
    *("network", "roles", "lora", "steps", "shift", "precision", "sample_shape", "label_counts", "value_range"),
)
GRID_SIDE = 10
"""Rows and columns of the sample grids."""


@dataclass(frozen=True)
class Task:
    """What the student learns to generate, apart from the teacher itself."""

    sample_shape: tuple[int, ...]
    """Shape of one sample."""
    conditions: Mapping[str, Rows]
    """Condition rows to draw from, leading dimension N, on the CPU; empty for an unconditional teacher."""
    negative_condition: Mapping[str, Tensor] | None = None
    """What guidance pushes away from, leading dimension 1."""
    label_counts: tuple[int, ...] | None = None
    """How often each label occurs, for class-conditional teachers."""
    value_range: tuple[float, float] | None = None
    """Smallest and largest value of a picture; None for other data."""
    samples: Rows | None = None
    """Real samples ``[N, *sample_shape]`` beside the condition rows, for methods that need data."""
    preview: Preview | None = None
    """What is looked at, where samples are no pictures."""

    @classmethod
    def from_dataset(cls, dataset: Dataset, teacher: nn.Module) -> "Task":
        """The task of a data set; its conditions are all used, its labels if the teacher has classes."""
        negative = dataset.negative_condition or null_condition(teacher)
        label = dataset.label if negative is not None and "label" in negative else None
        counts = None if label is None else tuple(torch.bincount(label, minlength=dataset.num_classes or 0).tolist())
        return cls(
            dataset.sample_shape,
            dict(dataset.conditions) if label is None else {**dataset.conditions, "label": label},
            None if negative is None else {name: value.cpu() for name, value in negative.items()},
            counts,
            dataset.value_range,
            None if isinstance(dataset.x, NoSamples) else dataset.x,
        )


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
        ValueError: settings that do not fit each other or the checkpoint.
        mfd_fast.training.interrupts.Interrupted: a signal or the time limit; it is saved and ``resume=True`` continues.
        FloatingPointError: gradients stayed non-finite.

    Source: arXiv 2606.11155.
    """
    context = context or make_context(settings.run)
    folder = RunFolder(Path(run))
    if not resume and folder.distill_checkpoints().exists():
        raise ValueError(f"{folder.path} already holds a distillation: pass resume=True, or choose another folder")
    task = data if isinstance(data, Task) else Task.from_dataset(data, teacher)
    check_fit(settings.distill, task, teacher)
    needs = method_from(settings.distill).needs
    check_settings(needs, settings.distill, context.world.size)
    check_runner(settings.distill, context.device)
    check_task(needs, settings.distill.method, teacher, task.samples, task.negative_condition)
    network = network_description(teacher, factory)
    if "pipeline" not in network and context.world.is_main and folder.has_network("teacher"):
        check_same_teacher(folder, teacher)
    seed = settings.run.seed
    frozen = frozen_copy(teacher, context)
    roles = make_roles(frozen, settings.distill, derive_seed(seed, "distill/init", 0), needs, context)
    begun = {} if resume is True else begin_from_adapters(roles, settings.distill)  # else a checkpoint has them
    student = make_student(roles, task, settings.distill, context.device, needs)
    samples = task.samples if needs.data else None
    conditions = ConditionTable(task.conditions, task.negative_condition, seed, samples)
    if needs.derivative:
        check_derivative(student, conditions, exact=settings.distill.precision == "float32")
    hook = grid_hook(folder, task, seed) if context.world.is_main and settings.distill.sample_every else None
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
    options = LoopOptions(
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
    with named_knobs(settings.distill, context.world.size):
        run_training(training, options, context.world)
    training.settle_student()
    state = roles.state_dict("student")
    if context.world.is_main:
        folder.write_network("student", state, student_description(network, task, settings.distill, needs))
    context.world.barrier()
    return student


def load_student(
    run: Path | str,
    network: nn.Module | None = None,
    device: str = "cpu",
    *,
    pipeline: Path | str | None = None,
    trust_code: bool = False,
) -> Student:
    """The finished student of a run; ``load_student(run).sample(16)`` makes samples.

    Args:
        run: the run folder.
        network: a module built as the teacher was, for runs whose teacher only its Python code can build; it gets the
            weights.
        device: where to put it.
        pipeline: folder or hub id of the pipeline, for runs whose teacher came from one (default: the run's own).
        trust_code: import and call the factory that the run names, for runs whose teacher came from one. It runs what
            the folder asks for: only for runs of your own, or of people you trust.

    Raises:
        FileNotFoundError: the run has no student yet, or its pipeline is no longer there.
        ValueError: the files do not fit each other or are damaged, or the run needs ``network`` or ``trust_code``.
    """
    folder = RunFolder(Path(run))
    description = read_student_description(folder)
    state = folder.read_tensors("student")
    if description["roles"] == "lora":
        base = backbone(folder, description, network, pipeline, trust_code=trust_code).to(device)
        lora = description["lora"]
        roles = low_rank_roles(base, lora["rank"], lora["alpha"], lora["targets"])
        roles.load_state_dict("student", state)
        field: Any = roles.student
    else:
        # Students of versions before 0.2 have neither a second time nor a gamma.
        second_time = bool(description.get("second_time", False))
        if "pipeline" in description["network"] and network is None:
            network = pipeline_network(folder, description, pipeline)
        built: Any = network
        if built is None:
            built = build_from_description(description["network"], state, trust_code=trust_code)
        field = with_weights(built.with_second_time() if second_time else built, state).to(device)
    counts, value_range = description["label_counts"], description["value_range"]
    return Student(
        autocast(field, PRECISIONS[description["precision"]]),
        tuple(description["sample_shape"]),
        description["steps"],
        description["shift"],
        label_counts=None if counts is None else tuple(counts),
        device=torch.device(device),
        value_range=None if value_range is None else (float(value_range[0]), float(value_range[1])),
        condition_names=tuple(description.get("condition_names", ())),
        gamma=description.get("gamma", 0.0),
        second_time=description.get("second_time", False),
        sampler=description.get("sampler", "euler"),
    )


def read_student_description(folder: RunFolder) -> dict[str, Any]:
    """What `student_description` wrote; ValueError if it is not all there."""
    description = folder.read_description("student")
    path = folder.path / "student.json"
    lacking = [name for name in NEEDED_OF_STUDENT if name not in description]
    if lacking:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(lacking)}")
    lora, counts, value_range = (description[name] for name in ("lora", "label_counts", "value_range"))
    low_rank = isinstance(lora, dict) and {"rank", "alpha", "targets"} <= lora.keys()
    for name, right in (
        ("network", isinstance(description["network"], dict)),
        ("precision", description["precision"] in list(PRECISIONS)),
        ("lora", low_rank or description["roles"] != "lora"),
        ("steps", type(description["steps"]) is int),
        ("sample_shape", _numbers(description["sample_shape"], int)),
        ("label_counts", counts is None or _numbers(counts, int)),
        ("value_range", value_range is None or (_numbers(value_range, int, float) and len(value_range) == 2)),
    ):
        if not right:
            raise ValueError(f"{path} is damaged: {name} is {description[name]!r:.80}")
    return description


def _numbers(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(item) in kinds for item in value)


def backbone(
    folder: RunFolder,
    description: Mapping[str, Any],
    network: nn.Module | None,
    pipeline: Path | str | None,
    *,
    trust_code: bool = False,
) -> nn.Module:
    """The frozen network below a low-rank student."""
    if "pipeline" in description["network"]:
        return network or pipeline_network(folder, description, pipeline)
    if network is None:
        return folder.read_teacher(trust_code=trust_code)
    return with_weights(network, folder.read_tensors("teacher"))


def pipeline_network(folder: RunFolder, description: Mapping[str, Any], pipeline: Path | str | None) -> nn.Module:
    """The network of the pipeline that a run's teacher came from.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: its weights are others.
    """
    made_from = description["network"]
    path = pipeline or folder.read_settings().model.pipeline
    if path is None:
        raise ValueError(f"{folder.path}: its teacher came from a pipeline; pass pipeline=PATH (--pipeline PATH)")
    found = find_pipeline(path, TEACHER_PARTS)
    network = load_network(made_from["pipeline"], found, PRECISIONS[description["precision"]])
    if weights_digest(network) != made_from["weights"]:
        raise ValueError(f"{path} has other weights than the pipeline that {folder.path} was made with")
    return network


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


def check_same_teacher(folder: RunFolder, teacher: nn.Module) -> None:
    """Raise ValueError if the folder's teacher, which its student will be compared with, has other weights."""
    kept = folder.read_tensors("teacher")
    given = {name: value.detach().cpu() for name, value in teacher.state_dict().items()}
    if kept.keys() != given.keys() or not all(torch.equal(kept[name], given[name]) for name in kept):
        raise ValueError(f"{folder.path} holds another teacher than the one given: choose another folder")


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
        needed_conditions(task),
        settings.student_gamma,
        needs.second_time,
        settings.student_sampler,
        settings.recompute_steps,
    )


def needed_conditions(task: Task) -> tuple[str, ...]:
    """Names of the conditions that a student of this task cannot draw for itself, as it draws labels."""
    return tuple(name for name in task.conditions if name != "label" or task.label_counts is None)


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


def student_description(
    network: dict[str, Any], task: Task, settings: DistillSettings, needs: Needs = DEFAULT_NEEDS
) -> dict[str, Any]:
    """What `load_student` needs to know, as JSON."""
    lora = {"rank": settings.lora_rank, "alpha": settings.lora_alpha, "targets": settings.lora_targets or None}
    return {
        "network": network,
        "roles": "full" if settings.roles == "full" else "lora",
        "lora": None if settings.roles == "full" else lora,
        "steps": settings.student_steps,
        "shift": settings.student_shift,
        "sampler": settings.student_sampler,
        "gamma": settings.student_gamma,
        "second_time": needs.second_time,
        "precision": settings.precision,
        "sample_shape": list(task.sample_shape),
        "label_counts": None if task.label_counts is None else list(task.label_counts),
        "value_range": None if task.value_range is None else list(task.value_range),
        "condition_names": list(needed_conditions(task)),
    }


def grid_hook(folder: RunFolder, task: Task, seed: int) -> SampleHook | None:
    """Writes a grid of samples from fixed noise to ``samples/``; None for data that is no picture."""
    if task.preview is not None:
        return preview_hook(folder, task.preview, seed)
    if task.value_range is None:
        return None
    value_range = task.value_range
    index = torch.arange(GRID_SIDE**2)
    if task.label_counts is not None:
        condition = {"label": index % len(task.label_counts)}
    else:
        condition = {name: rows[index % len(rows)] for name, rows in task.conditions.items()}

    def save(student_updates: int, student: Student) -> None:
        from mfd_fast.report import save_image_grid

        samples = student.sample(GRID_SIDE**2, condition, derive_seed(seed, "grid", 0))
        name = f"update-{student_updates:06d}.png"
        save_image_grid(folder.path / "samples" / name, samples, columns=GRID_SIDE, value_range=value_range)

    return save
