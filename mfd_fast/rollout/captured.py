"""Recorded rollouts: one replay of a CUDA graph for each evaluation of the field, with the solver's sums inside it.

A graph reads and writes fixed memory, so state, input and condition lie in `Slots`, and there is one graph for each
batch size of a short list (`bucket`); what fills up a batch is computed and thrown away. Weights are read where they
lie: an optimiser that changes them in place is seen, and before every rollout addresses, training flags, names (of the
adapter in use) and the like are compared with those at the time of the recording. Random draws of a network in training
mode go on from replay to replay.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mfd_fast.rollout import graphs
from mfd_fast.rollout.compiled import NotCompilable, compiled_field
from mfd_fast.rollout.execute import RolloutOptions, plan_intervals
from mfd_fast.rollout.graphs import Recorder
from mfd_fast.rollout.identity import Identity, Unknown, condition_key, fingerprint, identity_of
from mfd_fast.rollout.limited import row_limit
from mfd_fast.rollout.plan import Schedule, bucket, buckets, make_schedule
from mfd_fast.rollout.problem import Problem
from mfd_fast.rollout.program import NotLinear, Program, program_of
from mfd_fast.rollout.result import Rollout
from mfd_fast.rollout.slots import Slots, integrate_slots
from mfd_fast.rollout.table import Intervals
from mfd_fast.solvers import TorchdiffeqSolver, get_solver
from mfd_fast.types import VelocityField

Replays = dict[int, Callable[[], None]]
"""What repeats one evaluation of so many slots."""

MAX_RECORDINGS = 8
"""Fields (with a solver, a shape and the like) whose recordings are kept; the one not used for longest goes first."""
MAX_STATES = 4
"""States of its networks (addresses, flags, the adapter in use) that a recording keeps, likewise."""


class NotCapturable(Exception):
    """Why a field is not recorded."""


class Recording:
    """The slots of one field and, by the state of its networks, what was recorded for each batch size so far."""

    def __init__(self, problem: Problem, program: Program, slots: int) -> None:
        self.lock = threading.Lock()
        self.slots = Slots(problem.x, problem.condition, problem.field_dtype, program.memories, slots)
        self._device = problem.x.device
        self._recorder: Recorder | None = None
        self._states: OrderedDict[Hashable, Replays] = OrderedDict()
        self.replays: Replays = {}
        """Those that were prepared last."""

    def prepare(
        self, problem: Problem, fields: Sequence[VelocityField], networks: tuple[nn.Module, ...], sizes: set[int]
    ) -> RuntimeError | None:
        """Record what is missing with the first of ``fields`` (all the same but in speed) that can be recorded.

        Trial runs compute the first row of ``problem``.

        Returns:
            What went wrong with the last of them, if none can.
        """
        error = None
        for field in fields:
            state = fingerprint(networks)
            if self._recorder is None:
                self._states.clear()
                self._recorder = graphs.RECORDERS[self._device.type](self._device)
            self.replays = self._states.get(state, {})
            if not sizes <= self.replays.keys():
                try:
                    self._record(problem, field, sizes, self._recorder)
                except RuntimeError as failure:
                    error, self._recorder = failure, None
                    continue
                state = fingerprint(networks)  # a network may prepare something for itself when it is first run
            self._states[state] = self.replays
            self._states.move_to_end(state)
            if len(self._states) > MAX_STATES:
                self._states.popitem(last=False)
            return None
        return error

    def _record(self, problem: Problem, field: VelocityField, sizes: set[int], recorder: Recorder) -> None:
        """The largest batch first, so that the smaller ones find its memory."""
        self.slots.fill(problem.x, problem.times.t, problem.condition)
        for rows in sorted(sizes - self.replays.keys(), reverse=True):
            self.replays[rows] = recorder.record(partial(self.slots.advance, field, rows))

    def begin(self) -> None:
        """Called before the evaluations of a rollout."""
        assert self._recorder is not None
        self._recorder.begin()


_RECORDINGS: "OrderedDict[Hashable, Recording]" = OrderedDict()
_OWNERS: dict[Hashable, list[Any]] = {}
"""Weak references to what a key is about; when it goes, so does its recording."""


class CapturedRollout(NamedTuple):
    """A rollout with everything recorded that it needs."""

    recording: Recording
    replays: Replays
    program: Program
    intervals: Intervals
    schedule: Schedule
    batches: list[int]

    def run(self, problem: Problem, _: RolloutOptions) -> Rollout:
        """The rollout of the problem that was prepared; rows come back in the caller's order."""
        with self.recording.lock, torch.no_grad():
            self.recording.begin()
            return integrate_slots(
                self.recording.slots,
                lambda rows: self.replays[rows](),
                problem.x,
                problem.times,
                problem.condition,
                self.program,
                self.intervals,
                self.schedule,
                self.batches,
            )


def prepare_captured(problem: Problem, options: RolloutOptions) -> CapturedRollout:
    """Record what the rollout of ``problem`` needs and is not recorded yet.

    Raises:
        NotCapturable: it cannot be recorded.
    """
    identity, program = check_capturable(problem, options)
    rows = problem.x.shape[0]
    limit = row_limit(options.max_rows, problem.cost, rows)
    intervals = plan_intervals(problem, options)
    schedule = make_schedule(intervals.length, limit)
    # Without a limit of the memory a batch is padded to a size that other batches have too.
    count = limit if limit < rows else bucket(rows, 2 * rows)
    batches = buckets(schedule.live, count)
    key, recording = _recording(problem, identity, program, options.solver, count)
    with recording.lock, torch.no_grad():
        error = recording.prepare(problem, _fastest_first(problem.field), identity.networks, set(batches))
        replays = recording.replays
    if error is not None:
        forget(key)
        raise NotCapturable(f"recording it failed: {str(error).splitlines()[0]}") from error
    return CapturedRollout(recording, replays, program, intervals, schedule, batches)


def check_capturable(problem: Problem, options: RolloutOptions) -> tuple[Identity, Program]:
    """The identity of the field and the solver's program.

    Raises:
        NotCapturable: one of them is missing, or the device cannot record.
    """
    device = problem.x.device
    if (why := why_not_captured(device)) is not None:
        raise NotCapturable(why)
    if options.with_gradient:
        raise NotCapturable("recordings have no gradient")
    solver = get_solver(options.solver)
    if isinstance(solver, TorchdiffeqSolver) or not options.fixed_steps:
        raise NotCapturable("only fixed steps of this package's solvers are recorded; take steps= or another solver")
    if torch.is_autocast_enabled(device.type):
        raise NotCapturable("torch.autocast is on around the call; wrap the field in mfd_fast.fields.autocast instead")
    try:
        condition_key(problem.condition)
        identity, program = identity_of(problem.field), program_of(solver)
    except (Unknown, NotLinear) as reason:
        raise NotCapturable(str(reason)) from reason
    weights = (parameter for network in identity.networks for parameter in network.parameters())
    if (made := next(filter(is_traceable_wrapper_subclass, weights), None)) is not None:
        kind = type(made).__name__
        raise NotCapturable(f"its weights are of class {kind}: a graph would go on reading memory that they have left")
    return identity, program


def why_not_captured(device: torch.device) -> str | None:
    """Why nothing can be recorded on ``device``, or None."""
    if device.type in graphs.RECORDERS:
        return None
    return f"CUDA graphs need a CUDA device, this one is {device.type}"


def _fastest_first(field: VelocityField) -> list[VelocityField]:
    """The field with its network compiled where that is possible, and as it is."""
    try:
        return [compiled_field(field), field]
    except NotCompilable:
        return [field]


def _recording(
    problem: Problem, identity: Identity, program: Program, solver: str, slots: int
) -> tuple[Hashable, Recording]:
    """The recording for this kind of problem, with room for ``slots`` rows."""
    x = problem.x
    shape = (x.shape[1:], x.dtype, x.device, problem.field_dtype)
    key: Hashable = (identity.key, shape, condition_key(problem.condition), solver)
    found = _RECORDINGS.get(key)
    if found is None or found.slots.count < slots:
        _RECORDINGS[key] = found = Recording(problem, program, slots)
        _OWNERS[key] = [weakref.ref(network, lambda _: forget(key)) for network in identity.networks]
    _RECORDINGS.move_to_end(key)
    while len(_RECORDINGS) > MAX_RECORDINGS:
        forget(next(iter(_RECORDINGS)))
    return key, found


def forget(key: Hashable) -> None:
    """Drop one recording and its memory."""
    _RECORDINGS.pop(key, None)
    _OWNERS.pop(key, None)


def forget_all() -> None:
    """Drop every recording and its memory."""
    _RECORDINGS.clear()
    _OWNERS.clear()
