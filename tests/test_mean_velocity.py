"""Mean velocities against closed forms, and the two theorems about their gap."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast import integrate, mean_velocity, mean_velocity_pair
from mfd_fast.closed_forms import Gaussian, GaussianMixture
from mfd_fast.solvers import SOLVERS

LAW = Gaussian([1.3, -0.4], [0.6, 1.7])
OTHER = Gaussian([1.0, -0.4], [0.6, 1.5])
MIXTURE = GaussianMixture([0.5, 0.3, 0.2], [[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], [0.5, 0.8, 0.6])
HOW: dict[str, dict[str, Any]] = {
    **{name: {"solver": name, "steps": 6} for name in SOLVERS},
    "bosh3-adaptive": {"solver": "bosh3"},
}
ACCURATE: dict[str, dict[str, Any]] = {
    "rk4": {"solver": "rk4", "step_size": 0.01},
    "bosh3": {"solver": "bosh3", "rtol": 1e-9, "atol": 1e-9},
}


def _points(rows: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _times(rows: int, low: float = 0.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
    uniform = torch.rand(2, rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, r = low + (high - low) * uniform
    return t, r


@pytest.mark.parametrize("how", ACCURATE)
def test_both_directions_of_time(how: str) -> None:
    x, (t, r) = _points(20), _times(20)
    assert bool((t > r).any())
    assert bool((t < r).any())
    u = mean_velocity(LAW, x, t, r, **ACCURATE[how])
    end = integrate(LAW, x, t, r, **ACCURATE[how])
    torch.testing.assert_close(u, LAW.mean_velocity(x, t, r), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(end, LAW.flow_map(x, t, r), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(integrate(LAW, end, r, t, **ACCURATE[how]), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean_velocity(LAW, end, r, t, **ACCURATE[how]), u, rtol=1e-6, atol=1e-6)


def test_from_noise_to_data() -> None:
    """Noise becomes data: mean + std z in one stroke."""
    z = _points()
    for end in (integrate(LAW, z, 1, 0, solver="rk4"), z - mean_velocity(LAW, z, 1, 0, solver="rk4")):
        torch.testing.assert_close(end, LAW.mean + LAW.std * z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 28])
@pytest.mark.parametrize(("t", "r"), [(0.8, 0.25), (0.25, 0.8), (1.0, 0.0)])
def test_euler_is_the_closed_form_of_euler(t: float, r: float, steps: int) -> None:
    """G2."""
    x = _points()
    u = mean_velocity(LAW, x, t, r, steps=steps)
    start, end = (torch.full((len(x),), time, dtype=torch.float64) for time in (t, r))
    torch.testing.assert_close(u, LAW.euler_mean_velocity(x, start, end, steps), rtol=1e-12, atol=1e-12)
    if steps == 1:
        torch.testing.assert_close(u, LAW(x, start), rtol=1e-14, atol=1e-14)


def test_the_bias_of_euler_is_that_of_its_step() -> None:
    law = Gaussian(1.3, 0.6)
    x = torch.zeros(1, 1, dtype=torch.float64)
    exact = law.mean_velocity(x, torch.tensor([0.8]).double(), torch.tensor([0.25]).double())
    errors = [float((mean_velocity(law, x, 0.8, 0.25, steps=steps) - exact).abs()) for steps in (10, 20, 40)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("how", HOW)
def test_equal_times_are_the_limit_of_a_tiny_gap(how: str) -> None:
    """G5, and u tends to v as r tends to t."""
    x, (t, _) = _points(), _times(5, 0.1, 0.9)
    velocity = mean_velocity(MIXTURE, x, t, t, **HOW[how])
    assert torch.equal(velocity, MIXTURE(x, t))
    gaps = [1e-1, 1e-2, 1e-3, 1e-7]
    errors = [float((mean_velocity(MIXTURE, x, t, t - gap, **HOW[how]) - velocity).abs().max()) for gap in gaps]
    assert errors[3] < 1e-6
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.4)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("how", HOW)
def test_equal_fields_have_no_gap(how: str) -> None:
    """Theorem 4.3, one way: equal velocities everywhere give equal mean velocities, to the bit."""
    x, (t, r) = _points(12, torch.float32), _times(12)
    r[:2] = t[:2]
    twin = GaussianMixture(MIXTURE.weights.clone(), MIXTURE.means.clone(), MIXTURE.stds.clone())
    teacher, auxiliary = mean_velocity_pair(MIXTURE, twin, x, t.float(), r.float(), **HOW[how])
    assert torch.equal(teacher, auxiliary)
    assert bool(teacher.any())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("equal_times", [False, True], ids=["theorem-4.3", "theorem-4.1"])
def test_unequal_fields_have_a_gap(how: str, equal_times: bool) -> None:
    """The other way, for mean velocities and, with r = t, for velocities."""
    x, (t, r) = _points(12), _times(12, 0.1, 0.9)
    teacher, auxiliary = mean_velocity_pair(LAW, OTHER, x, t, t if equal_times else r, **HOW[how])
    assert float((teacher - auxiliary).norm(dim=1).min()) > 1e-2


def test_a_pair_is_two_mean_velocities() -> None:
    x, (t, r) = _points(), _times(5)
    first, second, stats = mean_velocity_pair(LAW, MIXTURE, x, t, r, solver="heun", step_size=0.1, return_stats=True)
    for field, u, part in ((LAW, first, stats.teacher), (MIXTURE, second, stats.auxiliary)):
        alone, expected = mean_velocity(field, x, t, r, solver="heun", step_size=0.1, return_stats=True)
        assert torch.equal(u, alone)
        assert torch.equal(part.evaluations, expected.evaluations)


def test_a_pair_guides_the_teacher_alone() -> None:
    x, (t, r) = _points(), _times(5)

    def field(x: Tensor, t: Tensor, push: Tensor) -> Tensor:
        return LAW(x, t) + push

    condition, negative = {"push": torch.ones(5, 2).double()}, {"push": torch.zeros(1, 2).double()}
    kwargs: dict[str, Any] = {"steps": 4, "condition": condition}
    teacher, auxiliary, stats = mean_velocity_pair(
        field, field, x, t, r, negative_condition=negative, guidance_scale=4.5, return_stats=True, **kwargs
    )
    assert torch.equal(auxiliary, mean_velocity(field, x, t, r, **kwargs))
    guided = mean_velocity(field, x, t, r, negative_condition=negative, guidance_scale=4.5, **kwargs)
    assert torch.equal(teacher, guided)
    assert not torch.allclose(teacher, auxiliary)
    assert torch.equal(stats.teacher.evaluations, 2 * stats.auxiliary.evaluations)


def test_a_pair_with_a_solver_each() -> None:
    x, (t, r) = _points(), _times(5)
    kwargs: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
    for solver, auxiliary_solver in (("bosh3", "rk4"), ("rk4", "bosh3")):
        pair = mean_velocity_pair(
            LAW, OTHER, x, t, r, solver=solver, auxiliary_solver=auxiliary_solver, auxiliary_step_size=0.05, **kwargs
        )
        teacher_options = kwargs if solver == "bosh3" else {}
        other_options = kwargs if auxiliary_solver == "bosh3" else {}
        assert torch.equal(pair[0], mean_velocity(LAW, x, t, r, solver=solver, **teacher_options))
        expected = mean_velocity(OTHER, x, t, r, solver=auxiliary_solver, step_size=0.05, **other_options)
        assert torch.equal(pair[1], expected)


def test_a_pair_with_a_step_size_for_the_auxiliary() -> None:
    x, (t, r) = _points(), _times(5)
    _, u, stats = mean_velocity_pair(LAW, OTHER, x, t, r, steps=3, auxiliary_step_size=0.05, return_stats=True)
    assert torch.equal(u, mean_velocity(OTHER, x, t, r, step_size=0.05))
    assert stats.teacher.steps.tolist() == [3] * 5
    assert stats.auxiliary.steps.tolist() == [math.ceil(gap / 0.05 - 1e-6) for gap in (t - r).abs().tolist()]


@pytest.mark.parametrize(
    "make",
    [
        lambda value: value,
        lambda value: torch.tensor(value),
        lambda value: torch.tensor(value, dtype=torch.float64),
        lambda value: torch.full((5,), value),
        lambda value: torch.full((5,), value, dtype=torch.float64),
        lambda value: torch.tensor(value).expand(5),
    ],
    ids=["float", "scalar", "scalar-float64", "rows", "rows-float64", "expanded"],
)
def test_forms_of_times(make: Callable[[float], Any]) -> None:
    x = _points(dtype=torch.float32)
    expected = mean_velocity(LAW, x, torch.full((5,), 0.75), torch.full((5,), 0.125))
    assert torch.equal(mean_velocity(LAW, x, make(0.75), make(0.125)), expected)
    assert torch.equal(mean_velocity(LAW, x, make(0.75), 0.125), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_whole_times(dtype: torch.dtype) -> None:
    x = _points()
    expected = mean_velocity(LAW, x, 1.0, 0.0)
    assert torch.equal(mean_velocity(LAW, x, 1, 0), expected)
    assert torch.equal(mean_velocity(LAW, x, torch.tensor(1, dtype=dtype), torch.zeros(5, dtype=dtype)), expected)


@pytest.mark.parametrize("how", HOW)
def test_times_that_float32_cannot_tell_apart_are_equal(how: str) -> None:
    """0.1 and float32(0.1) are different numbers, but the same time of a float32 state."""
    x = _points(dtype=torch.float32)
    u, stats = mean_velocity(LAW, x, 0.1, torch.tensor(0.1), return_stats=True, **HOW[how])
    assert torch.equal(u, LAW(x, torch.full((5,), 0.1)))
    assert stats.steps.tolist() == [0] * 5


@pytest.mark.parametrize(
    ("tolerance", "bound"), [(1e-3, 3e-2), (1e-5, 3e-4), (1e-7, 3e-6), (1e-9, 3e-8)], ids=lambda value: f"{value:g}"
)
def test_the_error_of_adaptive_steps_follows_the_tolerance(tolerance: float, bound: float) -> None:
    x, (t, r) = _points(20), _times(20)
    u = mean_velocity(LAW, x, t, r, solver="bosh3", rtol=tolerance, atol=tolerance)
    error = float((u - LAW.mean_velocity(x, t, r)).abs().max())
    assert bound / 1e4 < error < bound


def test_adaptive_steps_are_chosen_for_each_row() -> None:
    """A stiff row takes many steps, the calm row beside it few, as many as alone."""
    law = Gaussian(0.0, 0.01)
    x = torch.tensor([[1e-6], [30.0]], dtype=torch.float64)
    u, stats = mean_velocity(law, x, 1.0, 0.0, solver="bosh3", rtol=1e-4, atol=1e-4, return_stats=True)
    assert stats.steps[1] > 3 * stats.steps[0]
    _, alone = mean_velocity(law, x[:1], 1.0, 0.0, solver="bosh3", rtol=1e-4, atol=1e-4, return_stats=True)
    assert stats.steps[0] == alone.steps[0]
    torch.testing.assert_close(u, 0.99 * x, rtol=1e-2, atol=1e-4)


def test_fixed_steps_of_an_adaptive_solver() -> None:
    x, (t, r) = _points(), _times(5)
    u, stats = mean_velocity(LAW, x, t, r, solver="bosh3", steps=20, return_stats=True)
    assert stats.steps.tolist() == [20] * 5
    torch.testing.assert_close(u, LAW.mean_velocity(x, t, r), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("runner", ["auto", "eager"])
def test_statistics_say_who_ran(runner: str) -> None:
    u, stats = mean_velocity(LAW, _points(), 1.0, 0.0, runner=runner, return_stats=True)
    assert stats.runner == "eager"
    nothing_faster = "auto: mfd_fast.warmup has not found anything faster for this field"
    assert stats.reason == ("asked for" if runner == "eager" else nothing_faster)
    assert stats.first_bad is None
    assert [part.dtype for part in (stats.evaluations, stats.steps, stats.status)] == [torch.int64] * 3
    assert torch.equal(u, mean_velocity(LAW, _points(), 1.0, 0.0))


def test_defaults() -> None:
    x = _points()
    assert torch.equal(mean_velocity(LAW, x, 1.0, 0.0), mean_velocity(LAW, x, 1.0, 0.0, solver="euler", step_size=0.02))
    default = mean_velocity(LAW, x, 1.0, 0.0, solver="bosh3")
    assert torch.equal(default, mean_velocity(LAW, x, 1.0, 0.0, solver="bosh3", rtol=1e-2, atol=1e-2))


class _Field(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2))

    def forward(self, x: Tensor, t: Tensor, scale: Tensor) -> Tensor:
        velocity: Tensor = self.network(torch.cat([x, t[:, None]], 1)) * scale[:, None]
        return velocity


GUIDED: dict[str, Any] = {"negative_condition": {"scale": torch.tensor([0.1])}, "guidance_scale": 2.0}


@pytest.mark.parametrize("reference", [False, True], ids=["core", "definition"])
@pytest.mark.parametrize(
    "how",
    [
        *({"steps": 3}, {"solver": "bosh3"}, {"solver": "bosh3", "max_rows": 2}, {"max_rows": 2}, GUIDED),
        *(GUIDED | {"max_rows": 4}, GUIDED | {"guidance_interval": (0.2, 0.8)}, {"max_evaluations": 5}),
        {"solver": "torchdiffeq:rk4", "steps": 3},
    ],
    ids=str,
)
def test_what_the_host_plans_lies_on_the_cpu_whatever_the_default_device(
    how: dict[str, Any], reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``torch.set_default_device("cuda")`` is the first line of many scripts."""
    if reference:
        monkeypatch.setattr("mfd_fast.native.core", lambda: None)
    field, x, scale = _Field(), _points(5, torch.float32), torch.rand(5)
    t, r = _times(5)
    for times in ((t, r), (1.0, 0.0)):
        how = {"condition": {"scale": scale}, "return_stats": True, **how}
        expected, stats = mean_velocity(field, x, *times, **how)
        with torch.device("meta"):
            found, same = mean_velocity(field, x, *times, **how)
        assert torch.equal(found, expected)
        for name in ("evaluations", "steps", "status"):
            assert torch.equal(getattr(same, name), getattr(stats, name)), name
