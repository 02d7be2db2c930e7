"""What is computed: exactly what the statistics say, nothing twice, and nothing for rows that are done."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast import mean_velocity
from mfd_fast.closed_forms import Gaussian
from mfd_fast.solvers import SOLVERS

LAW = Gaussian([1.3, -0.4], [0.6, 1.7])
T = torch.tensor([0.5, 1.0, 0.3, 0.0, 0.9, 0.2])
R = torch.tensor([0.3, 0.0, 0.3, 1.0, 0.85, 0.7])
ROWS = torch.arange(6)


def _points(rows: int = 6) -> Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SOLVERS)
def test_fixed_steps(name: str, watched: Any) -> None:
    field = watched(LAW)
    kwargs: dict[str, Any] = {"steps": 5} if name == "bosh3" else {"step_size": 0.1}
    _, stats = mean_velocity(field, _points(), T, R, solver=name, condition={"row": ROWS}, return_stats=True, **kwargs)
    assert stats.steps.tolist() == ([5, 5, 0, 5, 5, 5] if name == "bosh3" else [2, 10, 0, 10, 1, 5])
    assert field.evaluations(6) == stats.evaluations.tolist()
    expected = [max(1, SOLVERS[name].evaluations(int(steps))) for steps in stats.steps]
    assert stats.evaluations.tolist() == expected
    assert sum(len(row) for _, _, row in field.calls) == int(stats.evaluations.sum())


def test_adaptive_steps(watched: Any) -> None:
    field = watched(LAW)
    _, stats = mean_velocity(
        field, _points(), T, R, solver="bosh3", rtol=1e-4, atol=1e-4, condition={"row": ROWS}, return_stats=True
    )
    assert field.evaluations(6) == stats.evaluations.tolist()
    assert stats.evaluations[2] == 1
    assert stats.steps[2] == 0
    assert len(set(stats.steps.tolist())) > 2, "rows of different lengths should take different numbers of steps"
    assert bool((stats.evaluations >= 1 + 3 * stats.steps).all())


@pytest.mark.parametrize("kwargs", [{"step_size": 0.07}, {"solver": "bosh3", "rtol": 1e-4}], ids=["fixed", "adaptive"])
def test_a_finished_row_never_comes_back(kwargs: dict[str, Any], watched: Any) -> None:
    field = watched(LAW)
    mean_velocity(field, _points(), T, R, condition={"row": ROWS}, **kwargs)
    present = [set(row.tolist()) for _, _, row in field.calls]
    assert all(later <= earlier for earlier, later in pairwise(present))
    assert present[0] == set(range(6))
    assert present[-1] < present[0]


@pytest.mark.parametrize("kwargs", [{"step_size": 0.1}, {"solver": "bosh3"}], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("together", [True, False], ids=["one-batch", "two-calls"])
def test_a_guided_evaluation_counts_twice(kwargs: dict[str, Any], together: bool, watched: Any) -> None:
    field = watched(lambda x, t, text: LAW(x, t) + text.mean(1, keepdim=True))
    condition = {"row": ROWS, "text": torch.randn(6, 3)}
    negative = {"text": torch.zeros(1, 3 if together else 1)}
    _, stats = mean_velocity(
        field,
        _points(),
        T,
        R,
        condition=condition,
        negative_condition=negative,
        guidance_scale=3.0,
        return_stats=True,
        **kwargs,
    )
    assert field.evaluations(6) == stats.evaluations.tolist()
    assert stats.evaluations[2] == 2
    assert bool((stats.evaluations % 2 == 0).all())
    calls_per_evaluation = 1 if together else 2
    assert len(field.calls) == int(stats.evaluations.max()) // 2 * calls_per_evaluation


@pytest.mark.parametrize("name", [*SOLVERS, "bosh3-adaptive"])
def test_equal_times_cost_one_evaluation_and_give_the_velocity(name: str, watched: Any) -> None:
    field = watched(LAW)
    steps = None if name == "bosh3-adaptive" else 4
    u, stats = mean_velocity(
        field,
        _points(),
        T,
        T,
        solver=name.removesuffix("-adaptive"),
        steps=steps,
        condition={"row": ROWS},
        return_stats=True,
    )
    assert torch.equal(u, LAW(_points(), T))
    assert stats.evaluations.tolist() == [1] * 6
    assert stats.steps.tolist() == [0] * 6
    assert stats.status.tolist() == [0] * 6
    assert len(field.calls) == 1


@pytest.mark.parametrize("name", [*SOLVERS, "bosh3-adaptive"])
def test_no_time_lies_outside_the_interval(name: str, watched: Any) -> None:
    """Sums of steps may pass the end by a rounding error, where a field need not be defined."""
    field, generator = watched(lambda x, t: torch.sqrt(t)[:, None] + torch.sqrt(1 - t)[:, None] - x), torch.Generator()
    t, r = torch.rand(2, 400, generator=generator.manual_seed(0)).pow(3)  # of any rounding
    t[:100], r[100:200], r[200:300] = 1.0, 0.0, 1.0
    for steps in (1, 3, 5, 7):
        count = None if name == "bosh3-adaptive" else steps
        condition = {"row": torch.arange(400)}
        mean_velocity(
            field, torch.ones(400, 1), t, r, solver=name.removesuffix("-adaptive"), steps=count, condition=condition
        )
    times = torch.cat([time for _, time, _ in field.calls])
    rows = torch.cat([row for _, _, row in field.calls])
    assert bool((times >= torch.minimum(t, r)[rows]).all())
    assert bool((times <= torch.maximum(t, r)[rows]).all())


@pytest.mark.parametrize(
    ("t", "r", "step_size", "steps"),
    [
        (0.06, 0.0, 0.02, 3),
        (0.0, 0.06, 0.02, 3),
        (1.0, 0.0, None, 50),
        (1.0, 0.0, 0.03, 34),
        (0.5, 0.499999, 0.02, 1),
        (0.061, 0.0, 0.02, 4),
    ],
)
def test_number_of_steps(t: float, r: float, step_size: float | None, steps: int) -> None:
    _, stats = mean_velocity(LAW, _points(), t, r, step_size=step_size, return_stats=True)
    assert stats.steps.tolist() == [steps] * 6


def test_times_of_euler_steps(watched: Any) -> None:
    field = watched(LAW)
    mean_velocity(field, _points(2), torch.tensor([0.8, 0.2]), 0.2, steps=3, condition={"row": torch.arange(2)})
    assert field.times(0) == pytest.approx([0.8, 0.6, 0.4], abs=1e-6)
    assert field.times(1) == pytest.approx([0.2])


def test_steps_of_the_adaptive_solver_stay_below_the_step_size(watched: Any) -> None:
    def steps_taken(step_size: float | None) -> tuple[list[float], int]:
        field: Any = watched(LAW)
        _, stats = mean_velocity(
            field,
            _points(1).double(),
            0.9,
            0.1,
            solver="bosh3",
            step_size=step_size,
            condition={"row": torch.zeros(1, dtype=torch.int64)},
            return_stats=True,
        )
        stages = field.times(0)[1:]  # half, three quarters and the whole of each step
        return [4 * (a - b) for a, b in zip(stages[::3], stages[1::3], strict=True)], int(stats.steps)

    free, _ = steps_taken(None)
    limited, count = steps_taken(0.05)
    assert max(free) > 0.1
    assert max(limited) <= 0.05 * (1 + 1e-9)
    assert count == 16


@pytest.mark.parametrize("kwargs", [{"step_size": 0.05}, {"solver": "bosh3"}], ids=["fixed", "adaptive"])
def test_the_field_is_asked_in_one_batch(kwargs: dict[str, Any], watched: Any) -> None:
    field: Callable[..., Tensor] = watched(LAW)
    _, stats = mean_velocity(field, _points(), T, R, condition={"row": ROWS}, return_stats=True, **kwargs)
    assert len(field.calls) == int(stats.evaluations.max())  # type: ignore[attr-defined]
