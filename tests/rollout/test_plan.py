"""Which rows take part in which step."""

import pytest
import torch

from mfd_fast.rollout.plan import make_plan
from mfd_fast.solvers import SOLVERS, Solver

EULER, RK4, BOSH3 = (SOLVERS[name] for name in ("euler", "rk4", "bosh3"))


def test_longest_rows_come_first_and_ties_keep_their_order() -> None:
    plan = make_plan(torch.tensor([2, 0, 3, 2]), EULER, None)
    assert plan.order.tolist() == [2, 0, 3, 1]
    assert plan.steps.tolist() == plan.run.tolist() == [3, 2, 2, 0]
    assert plan.live == [3, 3, 1]
    assert not plan.in_order


@pytest.mark.parametrize("steps", [[4, 2, 2, 0], [5, 5, 5], [0, 0], [1]], ids=str)
def test_sorted_batches_stay_in_place(steps: list[int]) -> None:
    plan = make_plan(torch.tensor(steps), EULER, None)
    assert plan.in_order
    assert plan.order.tolist() == list(range(len(steps)))
    assert len(plan.live) == steps[0]
    assert sum(plan.live) == sum(steps)


@pytest.mark.parametrize(
    ("solver", "budget", "run"),
    [(EULER, 4, [4, 3, 0, 4]), (RK4, 11, [2, 2, 0, 2]), (BOSH3, 10, [3, 3, 0, 3]), (BOSH3, 9, [2, 2, 0, 2])],
    ids=["euler", "rk4", "bosh3", "bosh3-one-less"],
)
def test_a_budget_ends_rows_early(solver: Solver, budget: int, run: list[int]) -> None:
    steps = torch.tensor([9, 3, 0, 5])
    plan = make_plan(steps, solver, budget)
    back = torch.argsort(plan.order)
    assert plan.run[back].tolist() == run
    assert plan.steps[back].tolist() == steps.tolist()
    assert len(plan.live) == max(run)


def test_a_budget_below_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match="one step of the solver, 4 evaluations of the field, got room for 3"):
        make_plan(torch.tensor([2, 0]), RK4, 3)
    assert make_plan(torch.tensor([0, 0]), RK4, 3).live == []
