"""Mean Flow Distillation on Gaussians, where every expectation is known (Gaussian data N(m, s^2), student a + b z)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Affine, DesignedDraws

from mfd_fast import mean_velocity
from mfd_fast.closed_forms import Gaussian
from mfd_fast.intervals import LogitNormal, Uniform
from mfd_fast.methods import METHODS, MethodOptions, make_method
from mfd_fast.methods.base import Actors, Batch
from mfd_fast.methods.mfd import MeanFlowDistillation, flow_matching_loss, rms_per_bin, surrogate_loss
from mfd_fast.models import build_model
from mfd_fast.models.lora import LoRARoles
from mfd_fast.path import conditional_velocity, interpolate
from mfd_fast.streams import RowDraws, Share, make_generator
from mfd_fast.student import Student
from mfd_fast.training.roles import FullRoles

MEAN, STD = 1.3, 0.6
CPU = torch.device("cpu")
STARTS = {"narrow": (-2.0, 0.2), "wide": (-2.0, 1.5), "right-width": (-2.0, 0.6)}


def student_loss(affine: Affine, draws: RowDraws, **rollout: Any) -> Tensor:
    """The loss of a student update with an exact auxiliary."""
    method = MeanFlowDistillation(MethodOptions(rollout=rollout or {"solver": "rk4", "steps": 16}))
    actors = Actors(Gaussian(MEAN, STD), affine.law(), Student(affine, (1,)))
    return method.student_loss(actors, Batch(draws, {})).value


def slope(std: float, t: Tensor, r: Tensor) -> Tensor:
    """c(t, r) of the mean velocity ``-m + c (x - (1-t) m)`` of N(m, std^2), written as a difference."""
    sigma_t, sigma_r = torch.hypot((1 - t) * std, t), torch.hypot((1 - r) * std, r)
    return (1 - sigma_r / sigma_t) / (t - r)


def expected_gradient(a: float, b: float, t: Tensor, r: Tensor) -> tuple[float, float]:
    t, r = t.double(), r.double()
    c_teacher, c_auxiliary = slope(STD, t, r), slope(abs(b), t, r)
    along_a = (1 - t) * (a - MEAN) * (1 + (1 - t) * c_teacher)
    along_b = (1 - t).square() * b * (c_teacher - c_auxiliary)
    return along_a.mean().item(), along_b.mean().item()


INTERVALS = {"short": ([0.5], [0.45]), "long": ([0.95], [0.05]), "several": ([0.2, 0.6, 0.9], [0.1, 0.2, 0.85])}


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize(("a", "b"), [*STARTS.values(), (2.0, 0.4), (1.0, -0.9)])
def test_student_gradient_is_the_closed_form(a: float, b: float, interval: str) -> None:
    t, r = (torch.tensor(times) for times in INTERVALS[interval])
    affine = Affine(a, b)
    torch.autograd.backward(student_loss(affine, DesignedDraws(t, r)))
    assert affine.gradient() == pytest.approx(expected_gradient(a, b, t, r), abs=1e-4)


def test_student_gradient_over_random_draws() -> None:
    share = Share(2**18, 0, 2**18)
    affine = Affine(1.0, 0.8)
    draws = RowDraws(make_generator(3, "test"), share, CPU)
    torch.autograd.backward(student_loss(affine, draws, solver="midpoint", step_size=0.2))
    same = RowDraws(make_generator(3, "test"), share, CPU)
    same.normal((1,)), same.normal((1,))
    t, r = same.pairs(LogitNormal(), 0.0)
    assert affine.gradient() == pytest.approx(expected_gradient(1.0, 0.8, t, r), abs=3e-3)


@pytest.mark.parametrize("a", [MEAN - 1, MEAN + 1])
def test_descent_moves_the_mean_of_the_student_to_the_teachers(a: float) -> None:
    affine = Affine(a, STD)
    torch.autograd.backward(student_loss(affine, DesignedDraws(torch.tensor([0.7]), torch.tensor([0.2]))))
    along_a, _ = affine.gradient()
    assert -along_a * (MEAN - a) > 0.1


@pytest.mark.parametrize("b", [STD, -STD], ids=["same", "mirrored"])
def test_the_right_distribution_is_a_fixed_point(b: float) -> None:
    affine = Affine(MEAN, b)
    draws = RowDraws(make_generator(0, "test"), Share(1000, 0, 1000), CPU)
    loss = student_loss(affine, draws, step_size=0.1)
    torch.autograd.backward(loss)
    # Both fields are the same law, so the gap is zero row by row and not only on average.
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert affine.gradient() == pytest.approx((0, 0), abs=1e-6)


@pytest.mark.parametrize("start", STARTS)
def test_descent_with_an_exact_auxiliary_reaches_the_teacher(start: str) -> None:
    affine = Affine(*STARTS[start])
    first, second = Uniform().sample(12, make_generator(0, "t")), Uniform().sample(12, make_generator(1, "t"))
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    optimizer = torch.optim.SGD(affine.parameters(), 0.8)
    for _ in range(120):
        optimizer.zero_grad()
        torch.autograd.backward(student_loss(affine, DesignedDraws(t, r, side=4), solver="euler", steps=4))
        optimizer.step()
    assert (affine.a.item(), affine.b.item()) == pytest.approx((MEAN, STD), abs=1e-3)


def test_without_an_auxiliary_the_student_collapses_to_the_mean() -> None:
    """With the conditional velocity in the auxiliary's place the spread goes to zero."""
    affine, teacher = Affine(-2.0, 1.0), Gaussian(MEAN, STD)
    t, r = torch.tensor([0.3, 0.6, 0.9]), torch.tensor([0.1, 0.2, 0.5])
    optimizer = torch.optim.SGD(affine.parameters(), 1.0)
    for _ in range(150):
        draws = DesignedDraws(t, r, side=4)
        noise, path_noise = draws.normal((1,)), draws.normal((1,))
        times, ends = draws.pairs(Uniform(), 0.0)
        data = Student(affine, (1,)).generate(noise, {}, with_gradient=True)
        x_t = interpolate(data, path_noise, times)
        u_teacher = mean_velocity(teacher, x_t.detach(), times, ends, solver="rk4", steps=4)
        gap = u_teacher - conditional_velocity(data, path_noise).detach()
        optimizer.zero_grad()
        torch.autograd.backward(surrogate_loss(x_t, gap))
        optimizer.step()
    assert (affine.a.item(), affine.b.item()) == pytest.approx((MEAN, 0), abs=1e-2)


def jacobian_and_omitted_gradients(b: float) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x_t of 1/2 mean |u_A - u_T|^2 with and without the Jacobian of both rollouts."""
    draws = DesignedDraws(torch.tensor([0.4, 0.8]), torch.tensor([0.1, 0.3]))
    noise, path_noise = draws.normal((1,)).double(), draws.normal((1,)).double()
    t, r = (times.double() for times in draws.pairs(Uniform(), 0.0))
    x_t = interpolate(-2.0 + b * noise, path_noise, t).requires_grad_(True)
    teacher, auxiliary = Gaussian(MEAN, STD), Gaussian(-2.0, b)
    u_teacher, u_auxiliary = (
        mean_velocity(field, x_t, t, r, solver="rk4", steps=16, differentiable=True) for field in (teacher, auxiliary)
    )
    (full,) = torch.autograd.grad(0.5 * (u_auxiliary - u_teacher).square().mean(), x_t, retain_graph=True)
    gap = (u_teacher - u_auxiliary).detach()
    (omitted,) = torch.autograd.grad(surrogate_loss(x_t, gap), x_t)
    assert torch.allclose(full, (slope(b, t, r) - slope(STD, t, r))[:, None] * -omitted, atol=1e-6)
    return full, omitted


@pytest.mark.parametrize(("b", "sign"), [(0.2, -1), (1.5, 1)], ids=["narrow", "wide"])
def test_the_full_jacobian_reverses_a_narrow_students_gradient(b: float, sign: int) -> None:
    full, omitted = jacobian_and_omitted_gradients(b)
    rows = slice(None, None, 2)  # rows of one interval: only there is one a multiple of the other
    cosine = torch.cosine_similarity(full[rows].flatten(), omitted[rows].flatten(), dim=0)
    assert cosine.item() == pytest.approx(sign, abs=1e-6)


def test_the_full_jacobian_is_blind_to_a_wrong_mean() -> None:
    full, omitted = jacobian_and_omitted_gradients(STD)
    assert full.abs().max().item() < 1e-9 * omitted.abs().max().item()


def test_variance_of_noisy_evaluations() -> None:
    """Noise of variance 1 in each of K evaluations: Var u = sum_i prod_{j>i} (1 - d kappa_j)^2 / K^2."""
    law, t, r, steps = Gaussian(0.0, STD), 0.8, 0.2, 20
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor, time: Tensor) -> Tensor:
        return law(x, time) + torch.randn(x.shape, generator=generator)

    u = mean_velocity(noisy, torch.ones(40_000, 1), t, r, steps=steps)
    grid = torch.linspace(t, r, steps + 1, dtype=torch.float64)[:-1]
    kappa = (grid - (1 - grid) * STD**2) / ((1 - grid) ** 2 * STD**2 + grid**2)
    factor = 1 - (t - r) / steps * kappa
    after = torch.cat([factor.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    expected = after.square().sum().item() / steps**2
    assert expected * steps == pytest.approx(0.76, abs=0.005)
    assert u.var().item() == pytest.approx(expected, rel=0.02)


def test_surrogate_refuses_a_gap_that_would_be_spread() -> None:
    with pytest.raises(ValueError, match=r"gap must have the shape of x_t, \(4, 2\), got \(1, 2\)"):
        surrogate_loss(torch.zeros(4, 2), torch.zeros(1, 2))


def test_surrogate_has_the_gradient_of_the_inner_product() -> None:
    x, gap = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_(True)
    (ours,) = torch.autograd.grad(surrogate_loss(x, gap), x)
    (inner_product,) = torch.autograd.grad((gap * x).mean(), x)
    torch.testing.assert_close(ours, inner_product, rtol=1e-12, atol=1e-15)
    assert surrogate_loss(x, gap).item() == pytest.approx(gap.square().mean().item() / 2, rel=1e-12)


def random_teacher(sample_shape: tuple[int, ...], num_classes: int | None = None) -> nn.Module:
    """A small MLP that is not the zero velocity it starts as."""
    torch.manual_seed(0)
    model = build_model("mlp", sample_shape, num_classes, width=16, depth=1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("role", ["student", "auxiliary"])
def test_only_the_updated_role_gets_a_gradient(kind: str, role: str) -> None:
    teacher = random_teacher((2,)).requires_grad_(True)
    roles: Any = FullRoles(teacher) if kind == "full" else LoRARoles(teacher, rank=2, alpha=2.0)
    actors = Actors(roles.teacher, roles.auxiliary, Student(roles.student, (2,)))
    method = MeanFlowDistillation(MethodOptions(rollout={"step_size": 0.5}))
    draws = RowDraws(make_generator(0, "test"), Share(8, 0, 8), CPU)
    if role == "student":
        loss = method.student_loss(actors, Batch(draws, {}))
    else:
        loss = method.auxiliary_loss(actors, Batch(draws, {}), torch.randn(8, 2))
    torch.autograd.backward(loss.value)
    other = "auxiliary" if role == "student" else "student"
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in roles.parameters(other))
    assert all(parameter.grad is not None for parameter in roles.parameters(role))
    assert not any(log.requires_grad for log in loss.logs.values())


def test_auxiliary_loss_is_flow_matching_on_fresh_student_samples() -> None:
    affine, field = Affine(0.5, 2.0), Gaussian(0.0, 1.0)
    method = MeanFlowDistillation(MethodOptions(auxiliary_law=Uniform()))
    draws = RowDraws(make_generator(0, "test"), Share(64, 0, 64), CPU)
    student = Student(affine, (1,))
    samples = student.generate(draws.normal((1,)), {})
    actual = method.auxiliary_loss(Actors(field, field, student), Batch(draws, {}), samples).value
    same = RowDraws(make_generator(0, "test"), Share(64, 0, 64), CPU)
    data, noise, t = 0.5 + 2.0 * same.normal((1,)), same.normal((1,)), same.times(Uniform())
    x_t = (1 - t[:, None]) * data + t[:, None] * noise
    assert actual.item() == pytest.approx((field(x_t, t) - (noise - data)).square().mean().item(), rel=1e-6)


def test_auxiliary_is_not_guided_and_the_teacher_is() -> None:
    torch.manual_seed(0)
    seen: dict[str, list[int]] = {"teacher": [], "auxiliary": []}

    def field(name: str, x: Tensor, label: Tensor) -> Tensor:
        seen[name] += label.tolist()
        return x * (1 + label[:, None])

    actors = Actors(
        lambda x, t, label: field("teacher", x, label),
        lambda x, t, label: field("auxiliary", x, label),
        Student(lambda x, t, label: x, (2,)),
    )
    method = MeanFlowDistillation(MethodOptions(guidance_scale=2.0, rollout={"steps": 1}))
    draws = RowDraws(make_generator(0, "test"), Share(3, 0, 3), CPU)
    negative = {"label": torch.tensor([9])}
    loss = method.student_loss(actors, Batch(draws, {"label": torch.tensor([0, 1, 2])}, negative))
    assert sorted(seen["teacher"]) == [0, 1, 2, 9, 9, 9]
    assert sorted(seen["auxiliary"]) == [0, 1, 2]
    assert loss.logs["evaluations"].item() == 3


@pytest.mark.parametrize(
    ("sample_shape", "batch"),
    [((1, 8, 8), 8), ((3, 4, 4), 3), ((3, 4, 4), 4), ((2,), 2)],
    ids=["batch = height", "batch = channels", "batch = width", "batch = dimension"],
)
@pytest.mark.parametrize("role", ["student", "auxiliary"])
def test_loss_of_a_batch_is_the_mean_of_its_rows(role: str, sample_shape: tuple[int, ...], batch: int) -> None:
    teacher = random_teacher(sample_shape, 5)
    roles = FullRoles(teacher)
    nn.init.normal_(next(iter(roles.auxiliary.parameters())), std=0.5)
    actors = Actors(roles.teacher, roles.auxiliary, Student(roles.student, sample_shape))
    method = MeanFlowDistillation(MethodOptions(rollout={"step_size": 0.2}, guidance_scale=1.5))
    label = torch.arange(batch) % 5

    def loss(first: int, rows: int) -> tuple[float, Tensor]:
        draws = RowDraws(make_generator(0, "test"), Share(batch, first, rows), CPU)
        condition = {"label": label[first : first + rows]}
        if role == "student":
            value = method.student_loss(actors, Batch(draws, condition, {"label": torch.tensor([5])})).value
        else:
            data = actors.student.generate(draws.normal(sample_shape), condition)
            value = method.auxiliary_loss(actors, Batch(draws, condition), data).value
        gradients = torch.autograd.grad(value, roles.parameters(role))
        return value.item(), torch.cat([gradient.flatten() for gradient in gradients])

    values, gradients = zip(*(loss(row, 1) for row in range(batch)), strict=True)
    value, gradient = loss(0, batch)
    assert max(values) > 1.05 * min(values)
    assert value == pytest.approx(sum(values) / batch, rel=1e-4)
    expected = torch.stack(gradients).mean(0)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_flow_matching_loss_expands_times_over_rows_not_columns() -> None:
    data, noise = torch.zeros(2, 2), torch.ones(2, 2)
    t = torch.tensor([0.0, 1.0])
    seen: list[Tensor] = []

    def field(x: Tensor, times: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    assert flow_matching_loss(field, data, noise, t, {}).item() == 1.0
    assert seen[0].tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_gap_per_time_bin() -> None:
    gap = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 2.0]])
    bins = rms_per_bin(gap, torch.tensor([0.05, 0.01, 1.0]), 10)
    assert bins[0].item() == pytest.approx(((25 + 1) / 4) ** 0.5)
    assert bins[9].item() == pytest.approx(2.0)
    assert bins[1:9].isnan().all()


def test_unknown_method_names_the_nearest() -> None:
    assert isinstance(make_method("mfd", MethodOptions()), METHODS["mfd"])
    with pytest.raises(ValueError, match=r"method must be one of mfd, vsd, .*, got 'mdf'; did you mean 'mfd'\?"):
        make_method("mdf", MethodOptions())
    with pytest.raises(ValueError, match=r"got 'zzz'$"):
        make_method("zzz", MethodOptions())
