"""Solvers as phases: what is read off a solver's step is the method."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast import mean_velocity
from mfd_fast.rollout.program import NotLinear, Phase, program_of
from mfd_fast.solvers import SOLVERS
from mfd_fast.solvers.ab2 import AB2
from mfd_fast.solvers.base import Step


def test_two_step_adams_bashforth_by_hand() -> None:
    program = program_of(AB2)
    assert program.memories == 1
    # Heun's two evaluations, which keep the first velocity; then 3/2 of the new one less half of the one before.
    assert program.start == (Phase(0.0, (0.0, 0.0), (1.0, 0.0), 0), Phase(1.0, (0.5, 0.5), (0.0, 0.0), -1))
    assert program.cycle == (Phase(1.0, (1.5, -0.5), (0.0, 0.0), 0),)
    assert program.at(7) == (program.cycle[0], 6.0)


def test_methods_that_need_no_memory() -> None:
    assert program_of(SOLVERS["euler"]).memories == 0
    assert program_of(SOLVERS["midpoint"]).memories == 0
    assert program_of(SOLVERS["midpoint"]).start == (Phase(0.0, (0.0,), (0.5,), -1), Phase(0.5, (1.0,), (0.0,), -1))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_program_integrates_like_its_solver(name: str) -> None:
    """One row, phase by phase in plain numbers, against the solver's own steps on a nonlinear field."""
    solver, steps, h = SOLVERS[name], 6, -0.11
    program = program_of(solver)
    assert len(program.start) == solver.evaluations(1)
    assert len(program.cycle) == solver.evaluations(3) - solver.evaluations(2)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * x) + t[:, None] * x

    x = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    position, first, memory = x, None, None
    for step in range(steps):
        now = torch.tensor([0.9 + step * h], dtype=torch.float64)
        first = velocity(position, now) if first is None else first
        width = torch.tensor([h], dtype=torch.float64)
        increment, first, _, memory = solver.step(velocity, position, now, width, first, memory)
        position = position + increment
    displacement, asked, kept = torch.zeros_like(x), x, [torch.full_like(x, torch.nan)] * program.memories
    for evaluation in range(solver.evaluations(steps)):
        phase, place = program.at(evaluation)
        terms = [velocity(asked, torch.tensor([0.9 + place * h], dtype=torch.float64)), *kept]
        gained, ahead = (
            h * sum((number * term for number, term in zip(numbers, terms, strict=True) if number), torch.zeros_like(x))
            for numbers in (phase.increment, phase.offset)
        )
        displacement = displacement + gained
        asked = x + displacement + ahead
        if phase.store >= 0:
            kept = [terms[0] if j == phase.store else old for j, old in enumerate(kept)]
    torch.testing.assert_close(x + displacement, position, rtol=1e-13, atol=1e-13)


@dataclass(frozen=True)
class Bad:
    """A solver of which a part is not what a program can say."""

    kind: str
    order: int = 1
    error_order: int | None = None

    def evaluations(self, steps: int) -> int:
        return steps

    def step(self, velocity: Any, x: Tensor, t: Tensor, h: Tensor, first: Tensor, memory: Tensor | None) -> Step:
        if self.kind == "exponential":
            return Step(torch.expm1(h)[:, None] * first, None, None, None)
        if self.kind == "time":
            return Step((h * (1 + t))[:, None] * first, None, None, None)
        weight = 0.0 if memory is None else 1.0
        total = first if memory is None else memory + first
        return Step(h[:, None] * (first + weight * 0.1 * total), None, None, total)


@pytest.mark.parametrize("kind", ["exponential", "time", "all-velocities-so-far"])
def test_other_solvers_are_refused(kind: str) -> None:
    why = "do not repeat" if kind == "all-velocities-so-far" else "depend on time or on the step size"
    with pytest.raises(NotLinear, match=why):
        program_of(Bad(kind))


def test_a_solver_without_a_program_runs_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOLVERS, "exponential", Bad("exponential"))
    x, t, r = torch.randn(7, 2, dtype=torch.float64), torch.linspace(0.3, 1, 7), 0.0
    rows: list[int] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        return -x

    how: dict[str, Any] = {"solver": "exponential", "step_size": 0.1}
    limited = mean_velocity(field, x, t, r, max_rows=3, **how)
    assert max(rows) == 3
    assert torch.equal(limited, mean_velocity(field, x, t, r, **how))
