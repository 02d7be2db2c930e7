"""Inductive moment matching: a kernel distance of laws, zero for the exact map."""

from typing import Any

import pytest
import torch
from toys import DoubleDraws, GaussianMap

from mfd_fast.closed_forms import Gaussian
from mfd_fast.methods import MethodOptions
from mfd_fast.methods.base import Actors, Batch
from mfd_fast.methods.imm import InductiveMomentMatching, squared_mmd
from mfd_fast.student import Student

MEAN, STD = 1.3, 0.6
TEACHER = Gaussian(MEAN, STD)


def test_distance_is_the_definition() -> None:
    y, other = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    scale = torch.tensor([0.5, 0.1, 0.9]).double()

    def mean_kernel(a: torch.Tensor, b: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
        return torch.stack([(-max((p - q).norm(), 1e-8) / (width * 5)).exp() for p in a for q in b]).mean()

    expected = [
        mean_kernel(a, a, w) + mean_kernel(b, b, w) - 2 * mean_kernel(a, b, w)
        for a, b, w in zip(y, other, scale, strict=True)
    ]
    torch.testing.assert_close(squared_mmd(y, other, scale), torch.stack(expected), rtol=1e-6, atol=1e-7)


def test_equal_sets_have_no_distance_and_a_finite_gradient() -> None:
    y = torch.randn(2, 4, 3, requires_grad=True)
    distance = squared_mmd(y, y.detach(), torch.tensor([0.5, 0.5]))
    assert distance.abs().max().item() < 1e-6
    (gradient,) = torch.autograd.grad(distance.sum(), y)
    assert bool(gradient.isfinite().all())
    assert gradient.abs().max().item() < 1e-5


def weighted_distance(network: Any, particles: int, seed: int) -> torch.Tensor:
    method = InductiveMomentMatching(MethodOptions(own={"particles": particles, "k": 8}))
    draws = DoubleDraws(4096, seed)
    actors = Actors(TEACHER, TEACHER, Student(network, (1,), second_time=True))
    return method.student_loss(actors, Batch(draws, {}, data=MEAN + STD * draws.normal((1,)))).value


def test_the_exact_map_has_equal_laws_though_not_equal_points() -> None:
    """In one dimension the two jumps of a point differ, their laws do not: the distance falls with 1 / particles."""
    method = InductiveMomentMatching(MethodOptions(own={"k": 4}))
    generator = torch.Generator().manual_seed(0)
    data = MEAN + STD * torch.randn(1500, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(1500, 1, generator=generator, dtype=torch.float64)
    t, s = torch.full((1500,), 0.9, dtype=torch.float64), torch.full((1500,), 0.1, dtype=torch.float64)
    r = method.earlier(t, s)
    assert torch.equal(r, s)  # the step down is so large that it ends at s, where the second jump is the point itself
    exact, wrong = GaussianMap(MEAN, STD), GaussianMap(MEAN, 0.3)
    distances = []
    for network in (exact, wrong):
        jumps = []
        for time in (t, r):
            x = (1 - time[:, None]) * data + time[:, None] * noise
            jumps.append((x - (time - s)[:, None] * network(x, time, s)).detach())
        distances.append(squared_mmd(jumps[0][None], jumps[1][None], torch.tensor([0.8])).item())
        if network is exact:
            assert (jumps[0] - jumps[1]).abs().mean().item() > 0.03
    assert distances[0] < 2 / 1500  # a point is compared with itself too, which alone gives about 1 / points
    assert distances[1] > 10 * distances[0]


def test_descent_finds_the_map() -> None:
    network = GaussianMap(0.6, 0.9)
    optimizer = torch.optim.Adam(network.parameters(), 0.05)
    for update in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - update / 300)
        optimizer.zero_grad()
        torch.autograd.backward(weighted_distance(network, 16, update))
        optimizer.step()
    assert network.values() == pytest.approx((MEAN, STD), abs=0.05)


def test_times_are_shared_by_a_group_and_in_order() -> None:
    method = InductiveMomentMatching(MethodOptions())
    t, r, s = method._times(Batch(DoubleDraws(64), {}))
    for times in (t, r, s):
        assert bool((times.view(-1, 4) == times.view(-1, 4)[:, :1]).all())
    assert bool(((s <= r) & (r < t)).all())
    assert len(t.unique()) == 16


def test_groups_hold_rows_of_one_label() -> None:
    method = InductiveMomentMatching(MethodOptions())
    label = torch.tensor([2, 0, 1, 0, 2, 1, 0, 0])
    data = label[:, None].double() * 10 + torch.arange(8)[:, None] / 100
    ordered, condition = method._ordered(data, Batch(DoubleDraws(8), {"label": label}))
    assert condition["label"].tolist() == sorted(label.tolist())
    assert (ordered[:, 0] / 10).floor().long().tolist() == condition["label"].tolist()


def test_weight_is_the_papers() -> None:
    method = InductiveMomentMatching(MethodOptions(own={"a": 2, "b": 5.0}))
    t = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    ratio = 2 * ((1 - t) / t).log()
    (slope,) = torch.autograd.grad(ratio.sum(), t)
    expected = 0.5 * torch.sigmoid(5 - ratio) * -slope * (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    torch.testing.assert_close(method.weight(t.detach()), expected.detach())
