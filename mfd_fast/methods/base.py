"""What a training objective is: losses of the trained roles, what it needs for them, and its own options."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mfd_fast.config import Field, Option, Section, SettingError, did_you_mean
from mfd_fast.guidance import guide
from mfd_fast.intervals import LogitNormal, TimeLaw
from mfd_fast.rows import first_rows
from mfd_fast.streams import RowDraws
from mfd_fast.student import Student
from mfd_fast.types import Condition, VelocityField

OWN_OPTIONS = "distill.method_options"
ROOTS = frozenset({"velocity_gap", "velocity_gap_bins", "residual"})
"""Names in `Loss.logs` that are root mean squares."""


class Discriminator(Protocol):
    """Tells samples of the data from samples of the student."""

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Logits ``[B]``, high for data, of noised samples ``x`` ``[B, ...]`` at ``t`` ``[B]``."""
        ...


class Actors(NamedTuple):
    """The roles as a method sees them."""

    teacher: VelocityField
    """The frozen teacher; never receives a gradient."""
    auxiliary: VelocityField
    """Tracks the distribution of the student; the teacher for a method without auxiliary."""
    student: Student
    """Generates samples from noise."""
    discriminator: Discriminator | None = None
    """For methods that need one."""
    target_weights: Callable[[], AbstractContextManager[None]] = nullcontext
    """Inside ``with target_weights():`` the student has the slowly moving weights that ``Needs.target_decay`` asks for.
    Leave it before the student computes anything with a gradient."""


class Batch(NamedTuple):
    """The rows of one update."""

    draws: RowDraws
    condition: Condition
    negative_condition: Condition | None = None
    """What guidance pushes away from."""
    data: Tensor | None = None
    """Real samples ``[B, ...]`` that belong to ``condition``, for methods that need them."""
    progress: float = 0.0
    """Student updates done over all of them."""


class Needs(NamedTuple):
    """What a method needs beyond a student; checked before a run by `mfd_fast.training.requirements`."""

    teacher: bool = True
    """Whether the teacher's velocity enters the losses, and with it guidance."""
    auxiliary: bool = True
    """A field that tracks the student; without it there are student updates only."""
    data: bool = False
    """Real samples."""
    discriminator: str | None = None
    """The role whose features a discriminator looks at: "teacher" or "auxiliary"."""
    derivative: bool = False
    """A forward-mode derivative (jvp) through the student's network."""
    second_time: bool = False
    """A student's network that takes the end r of its step."""
    random_start: bool = False
    """Student's weights that begin at random, not as the teacher's."""
    same_weights: bool = False
    """Auxiliary and student with the same parameters, so that one can be moved towards the other."""
    negative_condition: bool = False
    """Something to push away from, because the method sets the guidance itself."""
    renoising: bool = False
    """A student of several steps that puts fresh noise between them (gamma = 1)."""
    rows_multiple: int = 1
    """The rows of every backward pass must be a multiple of this."""
    target_decay: float = 0.0
    """Decay of the averaged weights of ``Actors.target_weights``; 0 for none."""


@dataclass(frozen=True)
class MethodOptions:
    """The settings of a run that methods share, and ``own``, those of the chosen method."""

    guidance_scale: float = 1.0
    """Guidance of the teacher; student and auxiliary have none."""
    pair_law: TimeLaw = field(default_factory=LogitNormal)
    """Law of the times of a student update: of both ends where there is an interval."""
    equal_share: float = 0.0
    """Share of intervals with r == t."""
    auxiliary_law: TimeLaw = field(default_factory=LogitNormal)
    """Law of the time in an auxiliary update."""
    rollout: Mapping[str, Any] = field(default_factory=dict)
    """How mean velocities are integrated: keyword arguments of `mfd_fast.mean_velocity_pair`."""
    own: Mapping[str, Option] = field(default_factory=dict)
    """Options of the method itself, by name; each has a dataclass for them."""


@dataclass(frozen=True, kw_only=True)
class OwnOptions(Section):
    """Options of one method; this one has none."""

    def error(self, name: str, problem: str) -> SettingError:
        """An error about the option ``name``."""
        return SettingError(f"{OWN_OPTIONS}.{name}", problem)

    @classmethod
    def words(cls) -> list[str]:
        """A line about each option."""
        usual = cls()
        found = ((item.name, Field.of(item.type)) for item in fields(cls))
        return [f"{name} = {getattr(usual, name)!r}: {of.help} ({of.words})" for name, of in found]


class Loss(NamedTuple):
    """A loss to back-propagate and what is worth logging about it."""

    value: Tensor
    """Scalar; the mean over all elements of the share."""
    logs: dict[str, Tensor]
    """Detached scalars or short vectors. Over backward passes and processes they are averaged, `ROOTS` by squares."""
    discriminator: Tensor | None = None
    """Scalar loss of the discriminator, for methods that train one beside the auxiliary."""


def averaged(name: str, parts: Tensor) -> Tensor:
    """One entry of `Loss.logs` from its values ``[parts, ...]`` in the parts of a batch; NaN does not count."""
    return parts.square().nanmean(0).sqrt() if name in ROOTS else parts.nanmean(0)


class Method:
    """A training objective.

    Raises:
        ValueError: an option of its own that does not exist or has a wrong value.
    """

    summary: ClassVar[str]
    """One line about the method."""
    Own: ClassVar[type[OwnOptions]] = OwnOptions
    """The dataclass of its own options."""

    def __init__(self, options: MethodOptions) -> None:
        self.options = options
        known = tuple(item.name for item in fields(self.Own))
        for name in options.own:
            if name not in known:
                of = f"one of {', '.join(known)}" if known else "left out: this method has no options"
                raise SettingError(OWN_OPTIONS, f"must be {of}; got {name!r}{did_you_mean(name, known)}")
        self.own = self.Own(**options.own)

    @property
    def needs(self) -> Needs:
        """What this method, with these options, needs."""
        return Needs()

    def samples(self, actors: Actors, batch: Batch) -> Tensor:
        """The student's samples ``[B, ...]`` that the auxiliary learns from, where they are more than one step of it or
        an integration without fresh noise; those the trainer generates ahead for many updates.
        """
        return fresh_samples(actors, batch, batch.draws.normal(actors.student.sample_shape))

    def auxiliary_loss(self, actors: Actors, batch: Batch, samples: Tensor) -> Loss:
        """The loss of an auxiliary update on ``samples`` ``[B, ...]`` of the student, which are constants.

        Only asked for if the method needs an auxiliary.
        """
        raise NotImplementedError(f"{type(self).__name__} has no auxiliary")

    def student_loss(self, actors: Actors, batch: Batch) -> Loss:
        """The loss of a student update."""
        raise NotImplementedError

    def after_student_update(self, auxiliary: list[nn.Parameter], student: list[nn.Parameter]) -> None:
        """What happens to the weights after each update of the student; nothing by default."""


def fresh_samples(actors: Actors, batch: Batch, noise: Tensor, *, with_gradient: bool = False) -> Tensor:
    """Samples of the student from ``noise``; a student that renoises draws more from the batch."""
    shape = actors.student.sample_shape
    return actors.student.generate(
        noise, batch.condition, with_gradient=with_gradient, fresh=lambda: batch.draws.normal(shape)
    )


@torch.no_grad()
def guided_velocity(field: VelocityField, x: Tensor, t: Tensor, batch: Batch, scale: float | Tensor) -> Tensor:
    """The velocity of ``field`` at ``x`` ``[B, ...]``, ``t`` ``[B]`` with the batch's condition and this guidance."""
    guided, condition, _ = guide(field, batch.condition, batch.negative_condition, scale, x)
    rows = condition if guided is not field else first_rows(condition, len(x))
    velocity: Tensor = guided(x, t, **rows)
    return velocity.to(x.dtype)


def real_samples(batch: Batch) -> Tensor:
    """The real samples of the batch, which the method has declared to need."""
    assert batch.data is not None, "the trainer gives data to methods that need it"
    return batch.data


def spread(data: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of generated ``data``, for the log."""
    return {"sample_mean": data.detach().mean(), "sample_std": data.detach().std()}
