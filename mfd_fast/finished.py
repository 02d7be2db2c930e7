"""The finished student of a run: what is written about it, and how it is loaded."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfd_fast.config import DistillSettings
from mfd_fast.fields import autocast
from mfd_fast.methods.base import Needs
from mfd_fast.pipelines import TEACHER_PARTS, find_pipeline, load_network, weights_digest
from mfd_fast.run_folder import RunFolder, build_from_description, with_weights
from mfd_fast.samplers import SAMPLERS
from mfd_fast.student import Student
from mfd_fast.task import Task
from mfd_fast.training.making_roles import low_rank_roles
from mfd_fast.training.optimizing import PRECISIONS


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _list_of(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(item) in kinds for item in value)


RIGHT: dict[str, Callable[[Any], bool]] = {
    "network": lambda value: isinstance(value, dict),
    "roles": lambda value: value in ("full", "lora"),
    "lora": lambda value: value is None or (isinstance(value, dict) and {"rank", "alpha", "targets"} <= value.keys()),
    "steps": lambda value: type(value) is int,
    "shift": _number,
    "sampler": lambda value: value in list(SAMPLERS),
    "gamma": _number,
    "second_time": lambda value: type(value) is bool,
    "precision": lambda value: value in list(PRECISIONS),
    "sample_shape": lambda value: _list_of(value, int),
    "label_counts": lambda value: value is None or _list_of(value, int),
    "value_range": lambda value: value is None or (_list_of(value, int, float) and len(value) == 2),
    "condition_names": lambda value: _list_of(value, str),
}
"""What a description says, and whether a value can be right."""


def student_description(network: dict[str, Any], task: Task, settings: DistillSettings, needs: Needs) -> dict[str, Any]:
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
        "condition_names": list(task.needed_conditions),
    }


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
        if "pipeline" in description["network"] and network is None:
            network = pipeline_network(folder, description, pipeline)
        built: Any = network
        if built is None:
            built = build_from_description(description["network"], state, trust_code=trust_code)
        field = with_weights(built.with_second_time() if description["second_time"] else built, state).to(device)
    counts, value_range = description["label_counts"], description["value_range"]
    return Student(
        autocast(field, PRECISIONS[description["precision"]]),
        tuple(description["sample_shape"]),
        description["steps"],
        description["shift"],
        label_counts=None if counts is None else tuple(counts),
        device=torch.device(device),
        value_range=None if value_range is None else (float(value_range[0]), float(value_range[1])),
        condition_names=tuple(description["condition_names"]),
        gamma=description["gamma"],
        second_time=description["second_time"],
        sampler=description["sampler"],
    )


def read_student_description(folder: RunFolder) -> dict[str, Any]:
    """What `student_description` wrote; ValueError if it is not all there."""
    description = folder.read_description("student")
    path = folder.path / "student.json"
    lacking = [name for name in RIGHT if name not in description]
    if lacking:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(lacking)}")
    wrong = [name for name, right in RIGHT.items() if not right(description[name])]
    if description["roles"] == "lora" and description["lora"] is None:
        wrong.append("lora")
    if wrong:
        raise ValueError(f"{path} is damaged: {wrong[0]} is {description[wrong[0]]!r:.80}")
    return description


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
