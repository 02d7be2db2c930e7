"""A solver's step taken apart into single evaluations of the field, for batches whose rows are in different phases.

A row that starts while others are under way is in its first step (which AB2 begins with two evaluations) when they are
in their tenth. What happens between two evaluations is the same for all of them but for numbers: sums of velocities
with coefficients that depend on the row. They are read off the solver's own ``step`` by running it on unit vectors, so
a solver is still described in one place.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfd_fast.solvers.base import Solver

TRACED_STEPS = 4
"""The first step may be a start, the second shows what repeats, the others that it does repeat."""


ROUNDING = 1e-12
"""Coefficients closer than this are one; they are sums of a few numbers near 1 in float64."""


class NotLinear(Exception):
    """Why a solver has no such form."""


class Phase(NamedTuple):
    """What follows one evaluation that gave the velocity v of a row with step h, from state start + displacement.

    ``displacement += h (increment[0] v + sum_j increment[1 + j] memory[j])``; the next evaluation is at
    ``start + displacement + h (offset[0] v + sum_j offset[1 + j] memory[j])``; then ``memory[store] = v``.
    """

    position: float
    """Time of this evaluation in steps since the start of the interval; later rounds of the cycle add 1 each."""
    increment: tuple[float, ...]
    offset: tuple[float, ...]
    store: int
    """Which memory keeps v, -1 for none."""


class Program(NamedTuple):
    """A solver as phases: the first step, then the cycle of each step after it."""

    start: tuple[Phase, ...]
    cycle: tuple[Phase, ...]
    memories: int
    """Velocities to remember for each row."""

    def at(self, evaluation: int) -> tuple[Phase, float]:
        """Phase and position of an evaluation of a row, counted from 0."""
        late = evaluation - len(self.start)
        if late < 0:
            return self.start[evaluation], self.start[evaluation].position
        rounds, place = divmod(late, len(self.cycle))
        return self.cycle[place], self.cycle[place].position + rounds


class _Trace(NamedTuple):
    """Everything in units of the step and as coefficients of the velocities in the order of their evaluation."""

    inputs: Tensor
    """``[E, E]``: where each evaluation took place, relative to the start."""
    positions: list[float]
    ends: list[int]
    """Evaluations made when each step was complete."""
    displacements: Tensor
    """``[steps, E]``: after each step."""

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """All numbers."""
        return self.inputs, torch.tensor(self.positions, dtype=torch.float64, device="cpu"), self.displacements


@cache
def program_of(solver: Solver) -> Program:
    """The phases of ``solver``.

    Raises:
        NotLinear: its steps are no sums of velocities with constant coefficients, or do not repeat.
    """
    trace, scaled = _trace(solver, 0.0, 1.0), _trace(solver, 0.25, -0.5)
    if trace.ends != scaled.ends or not all(map(torch.allclose, trace.values(), scaled.values())):
        raise NotLinear("the coefficients of the solver depend on time or on the step size")
    phases, memories = _phases(trace)
    first, second, third = trace.ends[:3]
    start, cycle, again = phases[:first], phases[first:second], phases[second:third]
    shifted = [phase._replace(position=phase.position + 1) for phase in cycle]
    if len(again) != len(shifted) or not all(map(_alike, again, shifted)):
        raise NotLinear("the steps of the solver after the first do not repeat")
    return Program(tuple(start), tuple(cycle), memories)


def _alike(one: Phase, other: Phase) -> bool:
    numbers = zip(
        (one.position, *one.increment, *one.offset), (other.position, *other.increment, *other.offset), strict=True
    )
    return one.store == other.store and all(abs(a - b) < ROUNDING for a, b in numbers)


def _trace(solver: Solver, begin: float, h: float) -> _Trace:
    """Run some steps in which the n-th evaluation gives the n-th unit vector."""
    size = 1 + solver.evaluations(TRACED_STEPS)
    exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    units = torch.eye(size, **exact)
    inputs: list[Tensor] = []
    positions: list[float] = []
    ends: list[int] = []
    displacements: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        inputs.append(x / h)
        positions.append((float(t) - begin) / h)
        return units[len(inputs) - 1 : len(inputs)]

    width, x = torch.full((1,), h, **exact), torch.zeros(1, size, **exact)
    first: Tensor | None = None
    memory: Tensor | None = None
    for step in range(TRACED_STEPS):
        now = torch.full((1,), begin + step * h, **exact)
        if first is None:
            first = velocity(x, now)
        increment, first, _, memory = solver.step(velocity, x, now, width, first, memory)
        x = x + increment
        ends.append(len(inputs))
        displacements.append(x / h)
    return _Trace(torch.cat(inputs), positions, ends, torch.cat(displacements))


def _phases(trace: _Trace) -> tuple[list[Phase], int]:
    """Coefficients after each evaluation, with a place in memory for each velocity that is needed again."""
    evaluations = len(trace.positions)
    increments, offsets = _differences(trace)
    used = (increments != 0) | (offsets != 0)
    places: dict[int, int] = {}
    """Velocity -> memory, of those that are needed again."""
    found: list[tuple[dict[int, int], int]] = []
    for e in range(evaluations):
        readable = dict(places)
        places = {velocity: place for velocity, place in places.items() if bool(used[e + 1 :, velocity].any())}
        store = -1
        if bool(used[e + 1 :, e].any()):
            store = places[e] = next(place for place in range(evaluations) if place not in places.values())
        found.append((readable, store))
    memories = 1 + max(store for _, store in found)
    phases = []
    for e, (readable, store) in enumerate(found):
        columns = [e] + [{place: velocity for velocity, place in readable.items()}.get(j, -1) for j in range(memories)]
        numbers = [tuple(float(row[c]) if c >= 0 else 0.0 for c in columns) for row in (increments[e], offsets[e])]
        phases.append(Phase(trace.positions[e], numbers[0], numbers[1], store))
    return phases, memories


def _differences(trace: _Trace) -> tuple[Tensor, Tensor]:
    """``[E, E]`` each: what every evaluation adds to the displacement, and where the next one is from there."""
    done = torch.zeros_like(trace.inputs[0])
    increments, offsets = [], []
    for e, following in enumerate([*trace.inputs[1:], None]):
        after = trace.displacements[trace.ends.index(e + 1)] if e + 1 in trace.ends else done
        increments.append(after - done)
        offsets.append(torch.zeros_like(done) if following is None else following - after)
        done = after
    exact = (torch.stack(increments), torch.stack(offsets))
    rounded = [part.masked_fill(part.abs() < ROUNDING, 0.0) for part in exact]
    return rounded[0], rounded[1]
