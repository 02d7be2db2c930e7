"""Which solver each side takes at equal error: the same search for this package and for diffrax.

Teacher and auxiliary are integrated apart with every choice of their grids, and any two of them are a pair: its error
is that of the difference of the two results, its time the sum of the two times. So a grid of 20 and 10 choices costs 30
integrations and not 200. A choice whose own error alone is above what is allowed in one draw is given up there.
"""

import statistics
from collections.abc import Callable, Sequence
from operator import le
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clock import cpu_seconds
from contenders import ROLES, Choice, DiffraxChoice, Half, Way
from workload import Draw, Velocities

LOW = torch.bfloat16
OWN_GRID: dict[str, tuple[Choice, ...]] = {
    "teacher": (
        *(Choice("ab2", dtype=LOW, steps=n) for n in (3, 4, 5, 6, 7)),
        *(Choice("ab2", size, LOW) for size in (0.08, 0.06, 0.05, 0.04)),
        *(Choice("midpoint", dtype=LOW, steps=n) for n in (2, 3, 4)),
        *(Choice("midpoint", size, LOW) for size in (0.12, 0.09, 0.07)),
        *(Choice("heun", dtype=LOW, steps=n) for n in (3, 4)),
        *(Choice("bosh3", dtype=LOW, steps=n) for n in (2,)),
        *(Choice("rk4", dtype=LOW, steps=n) for n in (1, 2)),
    ),
    "auxiliary": (
        *(Choice("midpoint", size, LOW) for size in (1.0, 0.4, 0.3, 0.2, 0.15)),
        *(Choice("ab2", size, LOW) for size in (1.0, 0.4, 0.3, 0.2, 0.15)),
    ),
}
DIFFRAX_GRID: dict[str, tuple[DiffraxChoice, ...]] = {
    "teacher": (
        *(DiffraxChoice("rescaled", "Midpoint", n) for n in (2, 3, 4, 5)),
        *(DiffraxChoice("rescaled", "Ralston", n) for n in (2, 3, 4, 5)),
        *(DiffraxChoice("rescaled", "Heun", n) for n in (3, 4)),
        *(DiffraxChoice("rescaled", "LeapfrogMidpoint", n) for n in (5, 6, 7)),
        *(DiffraxChoice("rescaled", "ReversibleHeun", n) for n in (5, 6, 7)),
        *(DiffraxChoice("rescaled", "Bosh3", n) for n in (2, 3)),
        *(DiffraxChoice("rescaled", "Dopri5", n) for n in (1, 2)),
        *(DiffraxChoice("rows", "Ralston", size) for size in (0.12, 0.09, 0.07)),
        DiffraxChoice("adaptive", "Bosh3", 0.1),
    ),
    "auxiliary": (
        *(DiffraxChoice("rescaled", "Midpoint", n) for n in (1, 2)),
        *(DiffraxChoice("rescaled", "Ralston", n) for n in (1, 2)),
        *(DiffraxChoice("rescaled", "LeapfrogMidpoint", n) for n in (2, 3, 4)),
        DiffraxChoice("rescaled", "Bosh3", 1),
        *(DiffraxChoice("rows", "Ralston", size) for size in (0.3, 0.2)),
    ),
}
DIVERGED = 1e9


class Trial(NamedTuple):
    """What one choice for one field showed, draw by draw."""

    choice: Any
    name: str
    seconds: list[float]
    velocities: list[Tensor]
    errors: list[float]
    """Its own error relative to the gradient; as many as draws, unless it was given up."""


class Pairing(NamedTuple):
    """Two trials together, on the draws that both were tried on."""

    teacher: Trial
    auxiliary: Trial
    seconds: list[float]
    errors: list[float]
    """Gradient errors."""

    def within(self, allowed: Sequence[float]) -> bool:
        """Whether it was tried on all draws and none is worse than allowed."""
        return len(self.errors) == len(allowed) and all(map(le, self.errors, allowed))


class Search(NamedTuple):
    """What a side tried and what it takes."""

    trials: dict[str, list[Trial]]
    pairings: list[Pairing]
    """All pairs of choices, the fastest first."""
    best: Pairing | None
    """The fastest whose gradient error is within what is allowed in every draw."""

    def record(self) -> dict[str, Any]:
        """The whole grid for the results."""
        trials = {
            role: [{"choice": t.name, "seconds": t.seconds, "error": t.errors} for t in tried]
            for role, tried in self.trials.items()
        }
        best = None if self.best is None else [self.best.teacher.name, self.best.auxiliary.name]
        return {"tried": trials, "pairs": len(self.pairings), "best": best}


def search(
    half: Callable[[str, Any], Half],
    grid: dict[str, Sequence[Any]],
    draws: list[Draw],
    fine: list[Velocities],
    allowed: list[float],
) -> Search:
    """Try a grid of choices for both fields and find the fastest pair that is within ``allowed`` in every draw."""
    trials = {
        role: [
            _try(half(role, choice), choice, ROLES.index(role), draws, fine, allowed)
            for choice in tqdm(grid[role], desc=f"solvers of the {role} at equal error", unit="choice")
        ]
        for role in ROLES
    }
    pairings = [_pairing(one, other, fine) for one in trials["teacher"] for other in trials["auxiliary"]]
    pairings.sort(key=lambda pairing: statistics.median(pairing.seconds))
    return Search(trials, pairings, next((pairing for pairing in pairings if pairing.within(allowed)), None))


def _try(half: Half, choice: Any, place: int, draws: list[Draw], fine: list[Velocities], allowed: list[float]) -> Trial:
    trial = Trial(choice, half.name, [], [], [])
    half.run(draws[0])  # compiles
    for draw, exact, most in zip(draws, fine, allowed, strict=True):
        trial.seconds.append(cpu_seconds(lambda draw=draw: trial.velocities.append(half.run(draw))))
        trial.errors.append(_relative(trial.velocities[-1] - exact[place], exact))
        if trial.errors[-1] > most:
            break
    return trial


def _pairing(teacher: Trial, auxiliary: Trial, fine: list[Velocities]) -> Pairing:
    triples = zip(teacher.velocities, auxiliary.velocities, fine, strict=False)
    errors = [_relative(u - exact[0] - (other - exact[1]), exact) for u, other, exact in triples]
    seconds = [one + other for one, other in zip(teacher.seconds, auxiliary.seconds, strict=False)]
    return Pairing(teacher, auxiliary, seconds, errors)


def _relative(difference: Tensor, exact: Velocities) -> float:
    """The size of a difference relative to the gradient; a large number where a solver has diverged."""
    size = float(difference.norm() / (exact[0] - exact[1]).norm())
    return size if size < DIVERGED else DIVERGED


def front(pairings: list[Pairing]) -> list[Pairing]:
    """Those of the pairs, fastest first, that are more accurate than all faster ones."""
    found: list[Pairing] = []
    for pairing in pairings:
        error = statistics.median(pairing.errors)
        if not found or error < statistics.median(found[-1].errors):
            found.append(pairing)
    return found


def as_way(side: Any, best: Pairing) -> Way:
    """The pair as one way to integrate both fields."""
    way: Way = side.way(best.teacher.choice, best.auxiliary.choice)
    return way
