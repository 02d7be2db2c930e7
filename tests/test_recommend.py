"""The recommended solver keeps its promise on fields whose solution is known."""

import pytest
import torch
from torch import Tensor

from mfd_fast import mean_velocity
from mfd_fast.closed_forms import Gaussian
from mfd_fast.intervals import LogitNormal, sample_pairs
from mfd_fast.recommend import BASELINE, CANDIDATES, recommend

TEACHER, AUXILIARY = Gaussian(mean=1.0, std=0.4), Gaussian(mean=0.6, std=0.7)


def problem(rows: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t, r = sample_pairs(LogitNormal(), rows, generator=generator)
    return torch.randn(rows, 3, generator=generator, dtype=torch.float64), t.double(), r.double()


def true_error(solver: str, options: dict[str, float], pair: bool = False) -> float:
    x, t, r = problem()
    u = mean_velocity(TEACHER, x, t, r, solver=solver, **options)
    exact = TEACHER.mean_velocity(x, t, r)
    if pair:
        u = u - mean_velocity(AUXILIARY, x, t, r, solver=solver, **options)
        exact = exact - AUXILIARY.mean_velocity(x, t, r)
    return float((u - exact).norm() / exact.norm())


@pytest.mark.parametrize("pair", [False, True], ids=["field", "pair"])
def test_errors_are_the_true_ones(pair: bool) -> None:
    found = recommend(TEACHER, *problem(), auxiliary=AUXILIARY if pair else None)
    assert len(found.trials) == len(CANDIDATES)
    assert found.reference_error < 1e-6
    for trial in found.trials:
        expected = true_error(trial.solver, trial.options, pair)
        assert trial.error == pytest.approx(expected, rel=0.02, abs=10 * found.reference_error)


def test_default_is_no_worse_than_euler_and_cheaper() -> None:
    found = recommend(TEACHER, *problem())
    baseline = next(trial for trial in found.trials if (trial.solver, trial.options) == BASELINE)
    assert found.best is not None
    assert found.best.error <= baseline.error
    assert found.best.evaluations < baseline.evaluations / 1.5
    cheaper = [trial for trial in found.trials if trial.evaluations < found.best.evaluations]
    assert all(trial.error > baseline.error for trial in cheaper)


def test_limits() -> None:
    x, t, r = problem()
    accurate = recommend(TEACHER, x, t, r, max_error=1e-4)
    assert accurate.best is not None
    assert accurate.best.error <= 1e-4
    cheap = recommend(TEACHER, x, t, r, max_evaluations=6)
    assert cheap.best is not None
    assert cheap.best.evaluations <= 6
    assert all(trial.error >= cheap.best.error for trial in cheap.trials if trial.evaluations <= 6)
    assert recommend(TEACHER, x, t, r, max_error=1e-12).best is None
    assert recommend(TEACHER, x, t, r, max_evaluations=0.5).best is None


def test_table_marks_the_best() -> None:
    found = recommend(TEACHER, *problem())
    assert found.best is not None
    lines = found.table().splitlines()
    assert len(lines) == len(CANDIDATES) + 1
    (marked,) = [line for line in lines if line.startswith("->")]
    assert found.best.solver in marked
    assert f"{found.best.error:.1e}" in marked


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_error": 0.1, "max_evaluations": 3}, "give max_error or max_evaluations, not both, got 0.1 and 3"),
        ({"max_error": 0.0}, "max_error must be positive, got 0.0"),
        ({"max_evaluations": -1}, "max_evaluations must be positive, got -1"),
    ],
    ids=["both", "error", "evaluations"],
)
def test_bad_limits(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recommend(TEACHER, *problem(), **limits)
