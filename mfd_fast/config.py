"""Typed settings of a run. Imports nothing of this package, so names of models, methods and solvers are
checked where they are used. Presets: `mfd_fast.presets`. Reading and writing: `mfd_fast.settings_io`.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, get_args, get_origin

Option = int | float | bool | str | list[Any]
"""A value in a free table of options; lists may nest."""


class SettingError(ValueError):
    """A setting with a wrong value: its dotted ``key`` and a sentence about the ``problem``."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.key} {self.problem}"


class Rule(NamedTuple):
    """A bound in words and as a test. None passes; for a list it holds for every element."""

    words: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def one_of(*choices: str) -> Rule:
    """The rule that a text is one of ``choices``."""
    return Rule("one of " + ", ".join(map(repr, choices)), choices.__contains__, choices)


POSITIVE = Rule("above 0", lambda value: value > 0)
NOT_NEGATIVE = Rule("at least 0", lambda value: value >= 0)
COUNT = Rule("at least 1", lambda value: value >= 1)
SHARE = Rule("from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)
NOT_EMPTY = Rule("not empty", lambda value: len(value) > 0)
STAGE = Rule("from 0 to 3", lambda value: 0 <= value <= 3)
ROLES = ("full", "lora", "lora-student")
PRECISION = one_of("float32", "bfloat16", "float16")
WEIGHTS = ("float", "int8", "fp8")


class Field(NamedTuple):
    """The annotation ``Annotated[type, help, rule]`` of a setting, taken apart."""

    type: Any
    help: str
    rule: Rule | None

    @classmethod
    def of(cls, annotation: Any) -> "Field":
        declared, help, *rule = get_args(annotation)
        return cls(declared, help, rule[0] if rule else None)

    @property
    def words(self) -> str:
        """What a value must be, such as "int, at least 1"."""
        if self.rule and self.rule.choices:
            return self.rule.words
        return type_words(self.type) + (f", {self.rule.words}" if self.rule else "")

    def accept(self, value: Any) -> Any:
        """``value`` in the declared type; ValueError says what was expected."""
        try:
            converted = convert(value, self.type)
        except TypeError:
            raise ValueError(f"must be {self.words}; got {value!r}") from None
        elements = converted if isinstance(converted, list) else [converted]
        if self.rule and not all(element is None or self.rule.holds(element) for element in elements):
            nearest = did_you_mean(converted, self.rule.choices) if self.rule.choices else ""
            raise ValueError(f"must be {self.words}; got {value!r}{nearest}")
        return converted


@dataclass(frozen=True, kw_only=True)
class Section:
    """A group of settings; types, bounds and choices are checked when it is made (ValueError with the dotted key)."""

    def __post_init__(self) -> None:
        for item in fields(self):
            try:
                value = Field.of(item.type).accept(getattr(self, item.name))
            except ValueError as error:
                raise self.error(item.name, str(error)) from None
            # Frozen: this writes the value in its declared type (an int given for a float becomes a float).
            object.__setattr__(self, item.name, value)

    def error(self, name: str, problem: str) -> SettingError:
        """An error about the field ``name``; the section is named after the class until the loader knows better."""
        return SettingError(f"{type(self).__name__.removesuffix('Settings').lower()}.{name}", problem)


def convert(value: Any, annotation: Any) -> Any:
    """``value`` in the type of a setting, or TypeError: int serves as float, bool never as int, "none" as None."""
    origin = get_origin(annotation)
    if origin is UnionType:
        return _convert_to_member(value, get_args(annotation))
    if origin is list and isinstance(value, list):
        (element,) = get_args(annotation)
        return [convert(item, Option if element is Any else element) for item in value]
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: convert(item, Option) for key, item in value.items()}
    if annotation is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if origin is None and annotation is not float and type(value) is annotation:
        return value
    raise TypeError


def _convert_to_member(value: Any, members: tuple[Any, ...]) -> Any:
    if NoneType in members and (value is None or value == "none"):
        return None
    for member in members:
        try:
            return convert(value, member)
        except TypeError:
            continue
    raise TypeError


_WORDS = {int: "int", float: "float", bool: "bool (true or false)", str: "text", NoneType: "none"}


def type_words(annotation: Any) -> str:
    """The type of a setting in words, such as "float or none"."""
    if annotation == Option:
        return "numbers, bools, texts or lists of them"
    if get_origin(annotation) is UnionType:
        return " or ".join(type_words(member) for member in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {type_words(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return f"table of {type_words(get_args(annotation)[1])}"
    return _WORDS.get(annotation, f"a {getattr(annotation, '__name__', annotation)}")


def did_you_mean(name: str, choices: tuple[str, ...]) -> str:
    """`` (did you mean '...'?)`` with the choice nearest to ``name``, or nothing when none is near."""
    near = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=0.4)
    return f" (did you mean {near[0]!r}?)" if near else ""


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    """The velocity network."""

    name: Annotated[str, "network, a name in MODELS", NOT_EMPTY] = "mlp"
    pipeline: Annotated[str | None, "diffusers pipeline with the network, a folder or hub id", NOT_EMPTY] = None
    options: Annotated[dict[str, Option], "options of that network's constructor"] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataSettings(Section):
    """The data."""

    name: Annotated[str, "dataset, a name in DATASETS", NOT_EMPTY] = "digits"
    root: Annotated[str | None, "folder of a dataset that is read from files", NOT_EMPTY] = None
    options: Annotated[dict[str, Option], "options of that dataset's loader"] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Section):
    """An optimiser with its schedule."""

    name: Annotated[str, "optimiser", one_of("adam", "adamw", "adamw8bit")] = "adamw"
    learning_rate: Annotated[float, "highest learning rate", POSITIVE] = 1e-3
    beta1: Annotated[float, "decay of the mean of the gradient", BELOW_ONE] = 0.9
    beta2: Annotated[float, "decay of the mean of the squared gradient", BELOW_ONE] = 0.999
    eps: Annotated[float, "added to the root of the mean squared gradient", POSITIVE] = 1e-8
    weight_decay: Annotated[float, "decay of the weights (decoupled for adamw)", NOT_NEGATIVE] = 0.0
    warmup_updates: Annotated[int, "updates over which the learning rate rises linearly", NOT_NEGATIVE] = 0
    schedule: Annotated[str, "course of the learning rate after warm-up", one_of("constant", "cosine", "linear")] = (
        "constant"
    )
    final_fraction: Annotated[float, "learning rate at the end of cosine or linear, over the highest", SHARE] = 0.0
    clip_norm: Annotated[float | None, "largest global norm of the gradient", POSITIVE] = 1.0


@dataclass(frozen=True, kw_only=True)
class TimeSettings(Section):
    """The law of the times t, or of the pairs (t, r)."""

    law: Annotated[str, "law of one time", one_of("uniform", "logit-normal")] = "logit-normal"
    mean: Annotated[float, "mean of logit(t) for logit-normal"] = 0.0
    std: Annotated[float, "standard deviation of logit(t) for logit-normal", POSITIVE] = 1.0
    shift: Annotated[float, "S in t' = S t / (1 + (S - 1) t); above 1 moves times towards noise", POSITIVE] = 1.0
    equal_share: Annotated[float, "share of pairs with r == t (pairs only)", SHARE] = 0.0
    low: Annotated[float, "smallest time", SHARE] = 0.0
    high: Annotated[float, "largest time", SHARE] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise self.error("low", f"must be below high = {self.high}; got {self.low}")


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(Section):
    """How mean velocities are integrated."""

    solver: Annotated[str, "solver, a name in SOLVERS", NOT_EMPTY] = "euler"
    step_size: Annotated[float | None, "step size; the largest step of an adaptive solver", POSITIVE] = 0.02
    steps: Annotated[int | None, "steps of every interval, in place of step_size", COUNT] = None
    rtol: Annotated[float | None, "relative tolerance of an adaptive solver", POSITIVE] = None
    atol: Annotated[float | None, "absolute tolerance of an adaptive solver", POSITIVE] = None
    max_evaluations: Annotated[int | None, "evaluations after which a row ends", COUNT] = None
    max_rows: Annotated[int | None, "network rows computed at once (none: all)", COUNT] = None
    auxiliary_solver: Annotated[str | None, "solver of the auxiliary (none: the same)", NOT_EMPTY] = None
    auxiliary_step_size: Annotated[float | None, "step size of the auxiliary (none: the same)", POSITIVE] = None
    guidance_interval: Annotated[list[float] | None, "guidance only from the one time to the other, [low, high]"] = None
    negative_every: Annotated[int, "evaluations that one unconditional velocity serves", COUNT] = 1
    runner: Annotated[str, "how rollouts are executed, a runner's name or auto", NOT_EMPTY] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None and self.steps is not None:
            raise self.error("steps", f"= {self.steps} needs step_size = none; got step_size = {self.step_size}")


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(Section):
    """Training of the flow-matching teacher."""

    updates: Annotated[int, "optimiser updates", NOT_NEGATIVE] = 3000
    batch_size: Annotated[int, "samples per update", COUNT] = 256
    condition_dropout: Annotated[float, "share of samples that lose their condition", BELOW_ONE] = 0.1
    ema_decay: Annotated[float, "decay of the averaged weights (0: no average)", BELOW_ONE] = 0.999
    precision: Annotated[str, "precision of the network", PRECISION] = "float32"
    optimizer: Annotated[OptimizerSettings, "optimiser of the teacher"] = field(default_factory=OptimizerSettings)
    times: Annotated[TimeSettings, "law of t"] = field(default_factory=TimeSettings)
    log_every: Annotated[int, "updates between lines of the log", COUNT] = 50
    checkpoint_every: Annotated[int, "updates between checkpoints (0: only at the end)", NOT_NEGATIVE] = 1000


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Section):
    """Distillation of the teacher into the student."""

    method: Annotated[str, "training objective, a name in METHODS", NOT_EMPTY] = "mfd"
    student_updates: Annotated[int, "optimiser updates of the student", NOT_NEGATIVE] = 1000
    cycle_auxiliary: Annotated[int, "auxiliary updates in a cycle", NOT_NEGATIVE] = 10
    cycle_student: Annotated[int, "student updates in a cycle", COUNT] = 1
    batch_size: Annotated[int, "samples per update, over all processes and backward passes", COUNT] = 256
    accumulation: Annotated[int, "backward passes per update", COUNT] = 1
    sample_rows: Annotated[int, "student samples generated at once, for several auxiliary updates", COUNT] = 1024
    compile: Annotated[
        str, "compile the updates (auto: where it saves more time than it takes)", one_of("auto", "off", "on")
    ] = "auto"
    student_steps: Annotated[int, "steps of the student from noise to a sample", COUNT] = 1
    student_shift: Annotated[float, "time shift of the student's steps (1: equal steps)", POSITIVE] = 1.0
    student_sampler: Annotated[str, "sampler of the student, a name in SAMPLERS", one_of("euler", "dpm++")] = "euler"
    recompute_steps: Annotated[bool, "compute the student's steps again in backward: memory of one for all"] = False
    recompute_blocks: Annotated[bool, "compute a transformer's blocks again in backward (SANA)"] = False
    student_gamma: Annotated[float, "share of fresh noise between the student's steps", SHARE] = 0.0
    grad_steps: Annotated[int | None, "last student steps that get a gradient (none: all)", COUNT] = None
    guidance_scale: Annotated[float, "classifier-free guidance of the teacher (1: off)"] = 1.0
    roles: Annotated[
        str, "full networks, LoRA on one backbone, or a LoRA student beside a full auxiliary", one_of(*ROLES)
    ] = "full"
    lora_rank: Annotated[int, "rank of the LoRA matrices", COUNT] = 64
    lora_alpha: Annotated[float, "scale of LoRA, times 1 / lora_rank", POSITIVE] = 64.0
    lora_targets: Annotated[list[str], "name endings of the layers that get LoRA (empty: all linear)", NOT_EMPTY] = (
        field(default_factory=list)
    )
    student_lora: Annotated[str | None, "LoRA that the student begins from, a file or its folder", NOT_EMPTY] = None
    auxiliary_lora: Annotated[str | None, "LoRA that the auxiliary begins from, likewise", NOT_EMPTY] = None
    ema_decay: Annotated[float, "decay of the student's averaged weights (0: no average)", BELOW_ONE] = 0.0
    precision: Annotated[str, "precision of the networks; states stay float32", PRECISION] = "float32"
    teacher_weights: Annotated[
        str, "numbers of the teacher in rollouts (int8, fp8: only while a gate lets them in)", one_of(*WEIGHTS)
    ] = "float"
    zero_stage: Annotated[int, "what ZeRO shares out: 1 states, 2 also gradients, 3 also weights (0: off)", STAGE] = 0
    zero_offload: Annotated[bool, "keep float32 weights and optimiser states in the host's memory (ZeRO)"] = False
    student_optimizer: Annotated[OptimizerSettings, "optimiser of the student"] = field(
        default_factory=OptimizerSettings
    )
    auxiliary_optimizer: Annotated[OptimizerSettings, "optimiser of the auxiliary"] = field(
        default_factory=OptimizerSettings
    )
    discriminator_optimizer: Annotated[OptimizerSettings, "optimiser of the discriminator, for methods with one"] = (
        field(default_factory=OptimizerSettings)
    )
    times: Annotated[TimeSettings, "law of the pairs (t, r) in student updates"] = field(default_factory=TimeSettings)
    auxiliary_times: Annotated[TimeSettings, "law of t in auxiliary updates"] = field(default_factory=TimeSettings)
    rollout: Annotated[RolloutSettings, "integration of the mean velocities"] = field(default_factory=RolloutSettings)
    log_every: Annotated[int, "student updates between lines of the log", COUNT] = 10
    sample_every: Annotated[int, "student updates between sample grids (0: none)", NOT_NEGATIVE] = 200
    checkpoint_every: Annotated[int, "student updates between checkpoints (0: only at the end)", NOT_NEGATIVE] = 500
    keep_checkpoints: Annotated[int, "newest checkpoints that are kept", COUNT] = 2
    max_skipped_updates: Annotated[int, "updates in a row with non-finite gradients before giving up", NOT_NEGATIVE] = (
        20
    )
    method_options: Annotated[dict[str, Option], "options of that method (mfd-fast info --methods)"] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grad_steps is not None and self.grad_steps > self.student_steps:
            problem = f"must be none or at most student_steps = {self.student_steps}; got {self.grad_steps}"
            raise self.error("grad_steps", problem)
        if self.zero_offload and self.zero_stage == 0:
            raise self.error("zero_offload", "needs zero_stage 1, 2 or 3; got zero_stage = 0")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Section):
    """What is measured after a run."""

    num_samples: Annotated[int | None, "samples per role (none: as many as the data)", COUNT] = None
    teacher_steps: Annotated[list[int], "numbers of steps the teacher is sampled with", COUNT] = field(
        default_factory=lambda: [1, 10, 100]
    )
    teacher_guidance_scale: Annotated[float, "guidance of the teacher's samples (1: off)"] = 1.0
    teacher_shift: Annotated[float, "time shift of the teacher's steps (1: equal steps)", POSITIVE] = 1.0
    labels: Annotated[str | None, "folder with recorded occupancy, SCENE/TOKEN/labels.npz", NOT_EMPTY] = None
    batch_size: Annotated[int, "samples per network call", COUNT] = 1024


@dataclass(frozen=True, kw_only=True)
class RunSettings(Section):
    """Where and how reproducibly a run is executed."""

    seed: Annotated[int, "seed of every random stream", NOT_NEGATIVE] = 0
    device: Annotated[str, "cpu, cuda, cuda:N or auto", NOT_EMPTY] = "auto"
    threads: Annotated[int | None, "CPU threads (none: what torch chooses)", COUNT] = None
    max_seconds: Annotated[
        float | None, "seconds of a command after which it saves and stops (none: no limit)", POSITIVE
    ] = None
    patience_seconds: Annotated[float, "seconds that processes wait for each other before they give up", POSITIVE] = (
        600.0
    )
    deterministic: Annotated[bool, "only algorithms that give the same bits again on this machine"] = False
    tensorboard: Annotated[bool, "also write TensorBoard events where tensorboard is installed"] = True


@dataclass(frozen=True, kw_only=True)
class Settings(Section):
    """Everything a run depends on besides the code."""

    preset: Annotated[str, "name of the preset the settings started from", NOT_EMPTY] = "demo"
    model: Annotated[ModelSettings, "network"] = field(default_factory=ModelSettings)
    data: Annotated[DataSettings, "data"] = field(default_factory=DataSettings)
    teacher: Annotated[TeacherSettings, "teacher training"] = field(default_factory=TeacherSettings)
    distill: Annotated[DistillSettings, "distillation"] = field(default_factory=DistillSettings)
    evaluate: Annotated[EvaluateSettings, "evaluation"] = field(default_factory=EvaluateSettings)
    run: Annotated[RunSettings, "execution"] = field(default_factory=RunSettings)
