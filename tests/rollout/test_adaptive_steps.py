"""What adaptive rollouts need of a solver."""

import pytest
import torch

from mfd_fast.rollout.adaptive_steps import integrate_adaptive
from mfd_fast.rollout.evaluator import RowEvaluator
from mfd_fast.solvers import SOLVERS
from mfd_fast.step_control import AdaptiveSteps


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.error_order is None])
def test_solvers_without_an_error_estimate_are_refused(name: str) -> None:
    evaluate = RowEvaluator(lambda x, t: x, {}, 2, torch.float32)
    with pytest.raises(ValueError, match="an adaptive solver must return an error estimate"):
        integrate_adaptive(
            evaluate, torch.ones(2, 1), torch.ones(2), torch.zeros(2), SOLVERS[name], AdaptiveSteps(), None
        )
