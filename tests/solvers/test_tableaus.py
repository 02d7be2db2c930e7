"""Conditions that the coefficients of a Runge-Kutta method must meet, and what a solver says it costs."""

import pytest
import torch
from torch import Tensor

from mfd_fast.solvers import SOLVERS, Solver
from mfd_fast.solvers.runge_kutta import RungeKutta

TABLEAUS = {name: solver for name, solver in SOLVERS.items() if isinstance(solver, RungeKutta)}


def test_all_but_the_multistep_method_are_tableaus() -> None:
    assert sorted(set(SOLVERS) - set(TABLEAUS)) == ["ab2"]


@pytest.mark.parametrize("name", TABLEAUS)
def test_stages_sit_where_their_weights_say(name: str) -> None:
    solver = TABLEAUS[name]
    assert [sum(row) for row in solver.matrix] == pytest.approx(list(solver.nodes))
    assert [len(row) for row in solver.matrix] == list(range(1, len(solver.weights)))
    assert sum(solver.weights) == pytest.approx(1)


def test_bosh3_estimates_its_distance_from_the_embedded_method() -> None:
    bosh3 = TABLEAUS["bosh3"]
    embedded = (7 / 24, 1 / 4, 1 / 3, 1 / 8)
    assert list(bosh3.error_weights) == pytest.approx([a - b for a, b in zip(bosh3.weights, embedded, strict=True)])
    assert sum(bosh3.error_weights) == pytest.approx(0, abs=1e-15)
    assert bosh3.reuses_last_stage


def test_error_estimate_shrinks_with_its_order() -> None:
    bosh3 = TABLEAUS["bosh3"]
    x, t = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * t)[:, None] + x.square()

    errors = []
    for h in (0.02, 0.01):
        step = bosh3.step(velocity, x, t, torch.full_like(t, h), velocity(x, t), None)
        assert step.error is not None
        errors.append(float(step.error))
    assert bosh3.error_order == 3
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize(
    ("name", "per_step", "once"),
    [("euler", 1, 0), ("midpoint", 2, 0), ("heun", 2, 0), ("ab2", 1, 1), ("rk4", 4, 0), ("bosh3", 3, 1)],
)
def test_evaluations(name: str, per_step: int, once: int) -> None:
    solver: Solver = SOLVERS[name]
    assert [solver.evaluations(steps) for steps in (1, 2, 50)] == [n * per_step + once for n in (1, 2, 50)]


def test_a_stage_without_weights_is_refused() -> None:
    hollow = RungeKutta(order=1, nodes=(0.5,), matrix=((0.0,),), weights=(1.0, 0.0))
    x = torch.ones(2, 1)
    with pytest.raises(ValueError, match="at least one non-zero weight"):
        hollow.step(lambda x, t: x, x, torch.ones(2), torch.ones(2), x, None)
