"""What adaptive rollouts need of a solver."""

import pytest
import torch

import mfd_fast
from mfd_fast.rollout.adaptive_steps import integrate_adaptive
from mfd_fast.rollout.evaluator import RowEvaluator
from mfd_fast.solvers import SOLVERS
from mfd_fast.step_control import AdaptiveSteps


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.error_order is None])
def test_solvers_without_an_error_estimate_are_refused(name: str) -> None:
    evaluate = RowEvaluator(lambda x, t: x, {}, 2, torch.float32)
    with pytest.raises(ValueError, match="an adaptive solver must return an error estimate"):
        integrate_adaptive(
            evaluate, torch.ones(2, 1), torch.ones(2), torch.zeros(2), SOLVERS[name], AdaptiveSteps(), 99
        )


def test_an_unreachable_tolerance_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfd_fast.rollout.execute.GENEROUS_EVALUATIONS", 100)
    x = torch.ones(2, 3, dtype=torch.float64)
    _, stats = mfd_fast.mean_velocity(
        lambda x, t: torch.sin(40 * x), x, 1.0, 0.0, solver="bosh3", rtol=1e-14, atol=1e-14, return_stats=True
    )
    assert stats.status.tolist() == [mfd_fast.Status.MAX_EVALUATIONS] * 2
    assert stats.evaluations.max() <= 100
