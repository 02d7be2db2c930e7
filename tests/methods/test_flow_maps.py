"""Methods that fit a map of the teacher's flow, on Gaussians: the exact map is their zero, and descent finds it."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import DoubleDraws, GaussianMap

from mfd_fast import mean_velocity
from mfd_fast.closed_forms import Gaussian
from mfd_fast.methods import MethodOptions, make_method
from mfd_fast.methods.base import Actors, Batch, Loss
from mfd_fast.methods.cd import ConsistencyDistillation
from mfd_fast.methods.derivative import tangent, total_derivative
from mfd_fast.methods.meanflow import adaptive
from mfd_fast.methods.mfd import flow_matching_loss
from mfd_fast.models import build_model
from mfd_fast.path import interpolate
from mfd_fast.streams import RowDraws, Share, make_generator
from mfd_fast.student import Student

MEAN, STD = 1.3, 0.6
TEACHER = Gaussian(MEAN, STD)
ROWS = 256

MAPS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "meanflow": ("meanflow", {"power": 0.0}, None),
    "ayf": ("ayf", {}, None),
    "cd-continuous": ("cd", {"mode": "continuous"}, 0.0),
    "cd-discrete": ("cd", {"mode": "discrete", "schedule": "skip", "skip": 0.001}, 0.0),
}
"""Method, its options, and where a network with one time ends."""


def evaluate(kind: str, network: nn.Module, *, seed: int = 0, progress: float = 1.0) -> Loss:
    name, own, end = MAPS[kind]
    method = make_method(name, MethodOptions(own=own))
    draws = DoubleDraws(ROWS, seed)
    data = MEAN + STD * draws.normal((1,))
    student = Student(network, (1,), second_time=end is None)
    return method.student_loss(Actors(TEACHER, TEACHER, student), Batch(draws, {}, data=data, progress=progress))


@pytest.mark.parametrize("kind", MAPS)
def test_the_exact_map_has_no_residual(kind: str) -> None:
    exact = evaluate(kind, GaussianMap(MEAN, STD, MAPS[kind][2])).logs["residual"].item()
    wrong = evaluate(kind, GaussianMap(MEAN, 0.7, MAPS[kind][2])).logs["residual"].item()
    if kind == "cd-discrete":  # a finite step of the teacher errs, by Heun's third order
        assert exact < 1e-7
    else:
        assert exact < 1e-10
    assert wrong > 100 * exact
    assert wrong > 1e-5


@pytest.mark.parametrize("kind", MAPS)
def test_descent_finds_the_map(kind: str) -> None:
    network = GaussianMap(0.2, 1.2, MAPS[kind][2])
    optimizer = torch.optim.Adam(network.parameters(), 0.05)
    for update in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - update / 200)
        optimizer.zero_grad()
        torch.autograd.backward(evaluate(kind, network, seed=update, progress=update / 200).value)
        optimizer.step()
    assert network.values() == pytest.approx((MEAN, STD), abs=0.01)


def test_meanflow_from_data_finds_the_map_without_a_teacher() -> None:
    network = GaussianMap(0.2, 1.2)
    method = make_method("meanflow", MethodOptions(equal_share=0.5, own={"velocity": "data"}))
    optimizer = torch.optim.Adam(network.parameters(), 0.05)
    for update in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - update / 200)
        draws = DoubleDraws(1024, update)
        data = MEAN + STD * draws.normal((1,))
        actors = Actors(_forbidden, _forbidden, Student(network, (1,), second_time=True))
        optimizer.zero_grad()
        torch.autograd.backward(method.student_loss(actors, Batch(draws, {}, data=data)).value)
        optimizer.step()
    assert network.values() == pytest.approx((MEAN, STD), abs=0.05)


def _forbidden(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("the teacher must not be asked")


def two_time_network(classes: int | None = None) -> Any:
    """A float64 network with random weights that uses its second time."""
    torch.manual_seed(0)
    network = build_model("mlp", (2,), classes, width=16, depth=1, time_features=8).with_second_time().double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def test_meanflow_at_equal_times_is_flow_matching() -> None:
    network, law = two_time_network(), Gaussian([1.0, -0.5], [0.5, 1.5])
    method = make_method("meanflow", MethodOptions(equal_share=1.0, own={"velocity": "data", "power": 0.0}))
    data = law.sample(64, dtype=torch.float64)
    actors = Actors(law, law, Student(network, (2,), second_time=True))
    ours = method.student_loss(actors, Batch(DoubleDraws(64), {}, data=data)).value
    same = DoubleDraws(64)
    noise, (t, _) = same.normal((2,)), same.pairs(method.options.pair_law, 1.0)
    theirs = 2 * flow_matching_loss(network, data, noise, t, {})  # a sum over the two elements, not their mean
    for a, b in zip(*(torch.autograd.grad(loss, list(network.parameters())) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_ayf_without_warm_up_and_norm_has_meanflows_target() -> None:
    network = two_time_network()
    x = torch.randn(16, 2, dtype=torch.float64)
    t, r = torch.full((16,), 0.8, dtype=torch.float64), torch.full((16,), 0.3, dtype=torch.float64)
    v = x.sin()
    u, derivative = total_derivative(network, x, t, v, {}, r=r)
    step = 1e-6
    difference = (network(x + step * v, t + step, r=r) - network(x - step * v, t - step, r=r)) / (2 * step)
    torch.testing.assert_close(u + tangent(u, v, derivative, t - r), v - 0.5 * difference, rtol=1e-5, atol=1e-6)
    normed = tangent(u, v, derivative, t - r, normaliser=0.1)
    norms = tangent(u, v, derivative, t - r).norm(dim=1)
    torch.testing.assert_close(normed.norm(dim=1), norms / (norms + 0.1))
    torch.testing.assert_close(tangent(u, v, derivative, t - r, share=0.0), v - u)


def test_adaptive_weight() -> None:
    squares = torch.tensor([4.0, 0.25], requires_grad=True)
    value = adaptive(squares, 1.0, 0.01)
    assert value.item() == pytest.approx((4 / 4.01 + 0.25 / 0.26) / 2)
    (gradient,) = torch.autograd.grad(value, squares)
    assert gradient.tolist() == pytest.approx([0.5 / 4.01, 0.5 / 0.26])
    assert adaptive(squares, 0.0, 0.01).item() == pytest.approx(4.25 / 2)


def test_guidance_from_data_mixes_with_and_without_label() -> None:
    """omega = 0.2, kappa = 0.92: v~ = 0.2 v - 0.12 u(null) + 0.92 u(label), inside the interval only."""
    network = two_time_network(3)
    own = {"velocity": "data", "omega": 0.2, "kappa": 0.92, "guidance_high": 0.5, "condition_dropout": 0.0}
    method: Any = make_method("meanflow", MethodOptions(own=own))
    x, v = torch.randn(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    t, label = torch.tensor([0.4, 0.6], dtype=torch.float64), torch.tensor([0, 1])
    batch = Batch(DoubleDraws(2), {"label": label}, {"label": torch.tensor([3])})
    actors = Actors(_forbidden, _forbidden, Student(network, (2,), second_time=True))
    guided = method._data_velocity(actors, batch, x, t, v, torch.zeros(2, dtype=torch.bool))
    expected = 0.2 * v - 0.12 * network(x, t, torch.tensor([3, 3])) + 0.92 * network(x, t, label)
    torch.testing.assert_close(guided[0], expected[0].detach())
    assert torch.equal(guided[1], v[1])


def test_dropped_conditions_get_the_velocity_of_the_path() -> None:
    method: Any = make_method("meanflow", MethodOptions(own={"velocity": "data", "condition_dropout": 0.5}))
    draws = RowDraws(make_generator(0, "test"), Share(64, 0, 64), torch.device("cpu"))
    condition, dropped = method._dropped(Batch(draws, {"label": torch.zeros(64).long()}, {"label": torch.tensor([3])}))
    assert 15 < dropped.sum().item() < 50
    assert condition["label"].tolist() == [3 if drop else 0 for drop in dropped]


@pytest.mark.parametrize("schedule", ["bins", "skip", "ect"])
def test_steps_of_consistency_distillation_go_down_and_shrink(schedule: str) -> None:
    method = ConsistencyDistillation(MethodOptions(own={"schedule": schedule}))
    t = torch.linspace(0.05, 1, 20)
    ends = [method.step_end(t, progress) for progress in (0.0, 0.3, 0.6, 0.999)]
    assert all(bool(((end >= 0) & (end < t)).all()) for end in ends)
    assert all(bool((late >= early - 1e-6).all()) for early, late in pairwise(ends))
    if schedule == "bins":
        assert [method._bins(progress) for progress in (0, 0.21, 0.41, 0.99, 1)] == [10, 20, 40, 160, 160]


def test_the_target_of_consistency_has_the_slow_weights() -> None:
    """The target is computed inside ``target_weights``, the prediction outside."""
    seen: list[bool] = []
    inside: list[bool] = [False]

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(inside[0])
        return x

    @contextmanager
    def slow() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    method = ConsistencyDistillation(MethodOptions(own={"target_decay": 0.9}))
    assert method.needs.target_decay == 0.9
    actors = Actors(TEACHER, TEACHER, Student(network, (1,)), target_weights=slow)
    method.student_loss(actors, Batch(DoubleDraws(4), {}, data=torch.zeros(4, 1)))
    assert seen == [True, False]


def test_reflow_learns_the_straight_field_of_its_pairs() -> None:
    """For N(m, s^2): v(x, t) = -m + (1-s) (x - (1-t) m) / ((1-t) s + t), straight, so one step is exact."""

    def straight(x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        return -MEAN + (1 - STD) * (x - (1 - t) * MEAN) / ((1 - t) * STD + t)

    options = MethodOptions(rollout={"solver": "rk4", "steps": 200, "auxiliary_solver": "euler"})
    method: Any = make_method("reflow", options)
    actors = Actors(TEACHER, TEACHER, Student(straight, (1,)))
    batch = Batch(DoubleDraws(64), {}, progress=0.0)
    assert method.student_loss(actors, batch).value.item() < 1e-12
    noise = DoubleDraws(64).normal((1,))
    data = method.sample_teacher(actors, batch, noise)
    torch.testing.assert_close(actors.student.jump(noise, 1.0, 0.0, {}), data, rtol=0, atol=1e-8)
    points = interpolate(data, noise, torch.full((64,), 0.4, dtype=torch.float64))
    along = mean_velocity(straight, points, 0.4, 0.0, steps=7)
    torch.testing.assert_close(along, noise - data, rtol=0, atol=1e-8)


def test_reflow_fits_one_step_at_the_end() -> None:
    method = make_method("reflow", MethodOptions(rollout={"steps": 2}, own={"one_step_from": 0.5}))
    times: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return x

    for steps, progress in ((1, 0.4), (1, 0.5), (2, 0.5)):
        actors = Actors(TEACHER, TEACHER, Student(network, (1,), steps=steps))
        method.student_loss(actors, Batch(DoubleDraws(8), {}, progress=progress))
    assert [bool((t == 1).all()) for t in times] == [False, True, False]
