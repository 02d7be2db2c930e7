"""The experiments about fields, the auxiliary, costs and logs: their numbers against closed forms."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast.closed_forms import Gaussian
from mfd_fast.experiments.auxiliary import AUXILIARY, MOMENTS, lag, velocity_of_points
from mfd_fast.experiments.base import Result, Work
from mfd_fast.experiments.cost import COST, peak_memory
from mfd_fast.experiments.healthy import HEALTHY, PLAIN, TRAINED, plain_training, summary
from mfd_fast.experiments.vector_field import (
    STUDENT,
    TEACHER,
    VECTOR_FIELD,
    R,
    T,
    expected_cosine,
    gap_field,
    grid,
    roughness,
)
from mfd_fast.models import build_model
from mfd_fast.report.theme import LIGHT, drawing_style


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(0, tmp_path, {})


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def drawn(experiment: Any, results: dict[str, list[Result]]) -> str:
    """What was found in words; the figure is made too."""
    with drawing_style(LIGHT):
        experiment.figure(results, LIGHT)
    words: str = experiment.finding(results)
    return words


def test_vector_fields_have_the_noise_of_their_convention(work: Work) -> None:
    settings = replace(VECTOR_FIELD.quick, draws=6, steps=10)
    found = {cell: VECTOR_FIELD.run(settings, cell, work) for cell in VECTOR_FIELD.cells(settings)}
    for cell in found.values():
        assert cell["vsd"]["noise"] == pytest.approx(2.0, rel=0.03)
        assert cell["vsd-averaged"]["noise"] == pytest.approx(2.0 / math.sqrt(10), rel=0.03)
        for kind in ("vsd", "vsd-averaged"):
            assert cell[kind]["cosine"] == pytest.approx(cell[kind]["expected_cosine"], abs=0.02)
        assert cell["mfd"]["cosine"] > cell["vsd-averaged"]["cosine"]
    # The same auxiliary with sqrt(K) less noise: to first order the noise of u is so much less.
    ratio = found["total"]["mfd"]["noise"] / found["each"]["mfd"]["noise"]
    assert ratio == pytest.approx(1 / math.sqrt(10), rel=0.1)
    assert "expected" in drawn(VECTOR_FIELD, {cell: [result] for cell, result in found.items()})


def test_gap_of_vsd_is_that_of_mfd_in_one_step() -> None:
    x = grid(5)
    assert torch.allclose(gap_field("mfd", x, 1, STUDENT), gap_field("vsd", x, 1, STUDENT))
    exact = TEACHER(x, x.new_full((25,), T)) - STUDENT(x, x.new_full((25,), T))
    assert torch.equal(gap_field("vsd", x, 7, STUDENT), exact)
    assert not torch.allclose(gap_field("mfd", x, 20, STUDENT), exact, atol=0.1)
    assert R < T


def test_roughness_of_known_fields() -> None:
    assert roughness(torch.ones(49, 2)) == 0
    noise = torch.randn(200 * 200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert roughness(noise) == pytest.approx(math.sqrt(2), rel=0.01)


@pytest.mark.parametrize("length", [0.1, 1.0, 6.0])
def test_expected_cosine_is_that_of_many_draws(length: float) -> None:
    exact = torch.tensor([[length, 0.0]], dtype=torch.float64)
    noise = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    measured = torch.nn.functional.cosine_similarity(exact, exact + 1.5 * noise).mean().item()
    assert expected_cosine(exact, 1.5) == pytest.approx(measured, abs=3e-3)


def test_velocity_of_points_is_that_of_their_law() -> None:
    law, generator = Gaussian([1.0, -0.5], [0.6, 1.2]), torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=generator)
    found = velocity_of_points(x, 0.7, law.sample(200_000, generator))
    assert torch.allclose(found, law(x, torch.full((400,), 0.7)), atol=0.06)
    single = velocity_of_points(x, 0.4, torch.tensor([[0.3, 0.2]]))
    assert torch.allclose(single, (x - torch.tensor([0.3, 0.2])) / 0.4, atol=1e-5)


@pytest.mark.parametrize("apart", [0.0, 0.3])
def test_lag_is_the_error_of_the_field(apart: float) -> None:
    law, generator = Gaussian([1.0, -0.5], [0.6, 1.2]), torch.Generator().manual_seed(0)
    first, second, data = law.sample(9024, generator).split([4000, 4000, 1024])

    def field(x: Tensor, t: Tensor) -> Tensor:
        velocity: Tensor = law(x, t)
        return velocity + apart

    assert lag(field, data, (first, second), generator) == pytest.approx(apart, abs=0.04)


def test_lag_along_small_trainings(work: Work) -> None:
    settings = replace(
        AUXILIARY.quick, ratios=(1,), ranks=(2,), teacher_updates=4, student_updates=MOMENTS, references=64, points=16
    )
    results = {cell: [AUXILIARY.run(settings, cell, work)] for cell in AUXILIARY.cells(settings)}
    assert list(results) == ["ratio-1", "rank-2"]
    for (found,) in results.values():
        assert len(found["lags"]) == MOMENTS
        assert all(math.isfinite(value) and value >= 0 for value in found["lags"])
    assert "rank 2 at 10:1" in drawn(AUXILIARY, results)


def test_cost_of_two_methods(work: Work) -> None:
    small = ("model.options.width=16", "model.options.depth=1", "distill.batch_size=16", "distill.cycle_auxiliary=2")
    settings = replace(
        COST.quick, preset="mixture-2d", methods=("mfd", "cd"), few=1, more=3, device="cpu",
        texts=(*small, "data.options.num_samples=64", "data.options.num_held_out=16"),
    )  # fmt: skip
    results = {cell: [COST.run(settings, cell, work)] for cell in COST.cells(settings)}
    (mfd,), (cd,) = results["mfd"], results["cd"]
    assert mfd["peak_bytes"] > cd["peak_bytes"] > 0  # an auxiliary with its optimiser
    assert mfd["seconds"] > 0
    assert "(paper 0.16, 0.75)" in drawn(COST, results)


def test_peak_memory_counts_tensors() -> None:
    with peak_memory(torch.device("cpu")) as found:
        kept = torch.zeros(1000)
        torch.zeros(3000)
        torch.zeros(500)
    assert found == [4 * 4000]
    assert len(kept) == 1000


def test_logs_of_all_runs(work: Work) -> None:
    settings = replace(HEALTHY.quick, teacher_updates=3, student_updates=3, batch_size=16)
    results = {cell: [HEALTHY.run(settings, cell, work)] for cell in HEALTHY.cells(settings)}
    assert list(results) == [*TRAINED, *PLAIN]
    for (found,) in results.values():
        assert all(len(found["logs"][name]["curve"]) == 3 for name in ("velocity_gap", "sample_std", "grad_norm"))
    assert "auxiliary_loss" not in results["no-auxiliary"][0]["logs"]
    assert "student too fast" in drawn(HEALTHY, results)


def test_plain_training_has_the_mistakes_that_it_is_told_to_make(work: Work) -> None:
    settings = replace(HEALTHY.quick, teacher_updates=60, student_updates=40, batch_size=64, plain_rate=1e-3)
    found = {cell: HEALTHY.run(settings, cell, work) for cell in ("plain", "no-auxiliary")}
    assert found["no-auxiliary"]["spread"] < 0.7 * found["plain"]["spread"]


def test_small_updates_of_bfloat16_weights_are_lost() -> None:
    settings = replace(HEALTHY.quick, student_updates=3, batch_size=16, plain_rate=1e-6)
    torch.manual_seed(0)
    teacher = build_model("mlp", (2,), width=16, depth=2)
    moved = {cell: plain_training(settings, cell, teacher, 0)[1] for cell in ("plain", "bfloat16-weights")}
    for name, weight in teacher.state_dict().items():
        large = weight.abs() > 1e-3
        rounded = weight.bfloat16().float()
        assert torch.equal(moved["bfloat16-weights"].state_dict()[name][large], rounded[large])
    assert any(
        not torch.equal(new, old) for new, old in zip(moved["plain"].parameters(), teacher.parameters(), strict=True)
    )


def test_summary_has_the_medians_of_tenths() -> None:
    found = summary([float(value) for value in range(100)])
    assert (found["first"], found["last"]) == (5.0, 95.0)
    assert found["curve"][-1] == pytest.approx(98, abs=1)
    assert summary([3.0]) == {"first": 3.0, "last": 3.0, "curve": [3.0]}
