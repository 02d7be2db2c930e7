"""The experiments on closed forms, with small budgets: their numbers, not that they are there."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mfd_fast.experiments import EXPERIMENTS, load_experiment
from mfd_fast.experiments.affine import MEAN, STD, TEACHER, draw_points, exact_gap, interval_grid, sampled_gradient
from mfd_fast.experiments.base import Result, Work
from mfd_fast.experiments.bias_noise import BIAS_NOISE, expected_shift
from mfd_fast.experiments.jacobian import JACOBIAN, exact_full_gradient, full_gap
from mfd_fast.experiments.low_pass import LOW_PASS, euler_gain, gaussian_gain, sinc
from mfd_fast.experiments.no_auxiliary import NO_AUXILIARY, conditional_gap, exact_gradient
from mfd_fast.experiments.step_size import STEP_SIZE
from mfd_fast.experiments.variance import VARIANCE, exact_variance
from mfd_fast.mean_velocity import mean_velocity


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(0, tmp_path, {})


def test_every_line_is_an_experiment() -> None:
    for name in EXPERIMENTS:
        experiment = load_experiment(name)
        assert experiment.summary
        assert len(set(experiment.cells(experiment.quick))) == len(experiment.cells(experiment.quick)) > 0


def test_variance_of_averaged_noise_is_the_closed_form(work: Work) -> None:
    found = VARIANCE.run(replace(VARIANCE.quick, rows=60_000, steps=(1, 4, 20)), "law", work)
    assert found["measured"] == pytest.approx(found["exact"], rel=0.02)
    assert found["exact"][0] == 1.0
    assert exact_variance(STD, 0.8, 0.2, 20) * 20 == pytest.approx(0.76, abs=0.005)


def test_variance_of_a_field_without_slope_is_one_over_k() -> None:
    # kappa vanishes at t = 1/2 for std 1, and an interval around it is short.
    assert exact_variance(1.0, 0.5 + 1e-6, 0.5 - 1e-6, 7) == pytest.approx(1 / 7, rel=1e-6)


@pytest.mark.parametrize("cell", ["with", "without"])
def test_gradients_of_batches_have_the_closed_forms(cell: str) -> None:
    gap = exact_gap if cell == "with" else conditional_gap
    measured = sampled_gradient(gap, 400_000, torch.Generator().manual_seed(0))(-2.0, 1.5)
    assert measured == pytest.approx(exact_gradient(cell)(-2.0, 1.5), rel=0.02)


def test_without_an_auxiliary_the_width_is_lost(work: Work) -> None:
    settings = replace(NO_AUXILIARY.quick, updates=120)
    ends = {cell: NO_AUXILIARY.run(settings, cell, work) for cell in ("with", "without")}
    for kind, tolerance in (("exact", 1e-2), ("sampled", 5e-2)):
        assert ends["with"][kind]["a"][-1] == pytest.approx(MEAN, abs=tolerance)
        assert ends["with"][kind]["b"][-1] == pytest.approx(STD, abs=tolerance)
        assert ends["without"][kind]["b"][-1] == pytest.approx(0, abs=tolerance)


@pytest.mark.parametrize("width", [0.2, STD, 1.5])
def test_full_gradient_of_batches_is_its_expectation(width: float) -> None:
    measured = sampled_gradient(full_gap, 400_000, torch.Generator().manual_seed(1))(0.8, width)
    assert measured == pytest.approx(exact_full_gradient(0.8, width), rel=0.03, abs=1e-12)


def test_full_gradient_turns_round_for_a_narrow_student(work: Work) -> None:
    found = JACOBIAN.run(replace(JACOBIAN.quick, cosine_rows=64), "cosine", work)
    for width, compared in zip(found["widths"], found["compared"], strict=True):
        assert compared["cosine_mean"] == pytest.approx(-1 if width < STD else 1, abs=1e-9)
        assert compared["error"] < 0.03


def test_descents_with_the_full_gradient(work: Work) -> None:
    settings = replace(JACOBIAN.quick, updates=400, rows=64)
    ends = {name: JACOBIAN.run(settings, name, work) for name in ("narrow", "right", "wide")}
    assert ends["narrow"]["exact"]["a"][-1] < -10
    assert ends["right"]["exact"]["a"][-1] == ends["right"]["sampled"]["a"][-1] == -2
    assert ends["wide"]["exact"]["a"][-1] == pytest.approx(MEAN, abs=0.1)


def test_gains_of_a_wave(work: Work) -> None:
    settings = replace(LOW_PASS.quick, frequencies=6, steps=400)
    found = {cell: LOW_PASS.run(settings, cell, work) for cell in LOW_PASS.cells(settings)}
    assert found["constant"]["measured"] == pytest.approx(found["constant"]["sinc"], abs=1e-3)
    assert found["gaussian"]["measured"] == pytest.approx(found["gaussian"]["expected"], abs=5e-3)
    assert found["euler"]["measured"] == pytest.approx(found["euler"]["expected"], abs=1e-9)


def test_closed_forms_of_the_gains() -> None:
    assert sinc(0) == 1
    assert sinc(math.pi) == pytest.approx(0, abs=1e-15)
    half = 17.0 * 0.8 / 10 / 2
    assert euler_gain(17.0, 10) == pytest.approx(abs(math.sin(10 * half) / (10 * math.sin(half))))
    # A constant added to the field: what the package's own mean velocity of the Gaussian makes of it.
    x = torch.zeros(1, 1, dtype=torch.float64)
    moved = mean_velocity(lambda x, t: TEACHER(x, t) + 1, x, 0.9, 0.1, solver="rk4", steps=200)
    plain = mean_velocity(TEACHER, x, 0.9, 0.1, solver="rk4", steps=200)
    assert gaussian_gain(0.0) == pytest.approx((moved - plain).item(), abs=1e-6)


@pytest.mark.parametrize("cell", ["mfd", "vsd"])
def test_a_bias_shifts_the_student_by_the_closed_form(work: Work, cell: str) -> None:
    settings = replace(BIAS_NOISE.quick, biases=(0.3,), noises=(0.0,), updates=60, learning_rate=0.5, step_size=0.02)
    still = BIAS_NOISE.run(settings, cell, work)["found"][0]
    assert still["shift"] == pytest.approx(expected_shift(cell, 0.3), rel=0.05)


def test_noise_makes_the_student_of_vsd_wander_more(work: Work) -> None:
    settings = replace(BIAS_NOISE.quick, biases=(0.0,), noises=(0.0, 3.0), updates=80, learning_rate=0.4)
    rows = {cell: BIAS_NOISE.run(settings, cell, work)["found"] for cell in ("mfd", "vsd")}
    assert rows["mfd"][0]["wander"] < 1e-12
    assert 0 < rows["mfd"][1]["wander"] < 0.8 * rows["vsd"][1]["wander"]
    assert len(rows["mfd"]) == 3  # the calm one, the noisy one, and both together


def test_bfloat16_states_get_worse_with_small_steps(work: Work) -> None:
    settings = replace(STEP_SIZE.quick, rows=256, step_sizes=(0.001, 0.02, 0.25))
    found: Result = STEP_SIZE.run(settings, "gaussian", work)
    points = draw_points(MEAN, STD, 256, torch.Generator().manual_seed(0))
    euler: Any = [
        (TEACHER.euler_mean_velocity(points.x_t, torch.full((256,), 0.8), torch.full((256,), 0.3), steps)
         - TEACHER.mean_velocity(points.x_t, torch.full((256,), 0.8), torch.full((256,), 0.3))).abs().max().item()
        for steps in (500, 25, 2)
    ]  # fmt: skip
    assert found["evaluations"] == [500, 25, 2]
    assert all(error < bound for error, bound in zip(found["float32"], euler, strict=True))
    assert found["float32"][0] < found["float32"][1] < found["float32"][2]
    assert found["bfloat16"][0] > 0.1 > found["bfloat16"][1]
    assert found["rounding"][0] > found["rounding"][1] > found["rounding"][2]


def test_intervals_of_the_grid_have_the_mean_of_sorted_uniforms() -> None:
    t, r = interval_grid()
    assert (t.mean().item(), r.mean().item()) == pytest.approx((2 / 3, 1 / 3), abs=1e-2)
