"""DMD2 and SenseFlow: the parts of their losses by themselves."""

import pytest
import torch
from torch import Tensor, nn
from toys import Affine, DesignedDraws, GaussianMap

from mfd_fast.closed_forms import Gaussian
from mfd_fast.intervals import Uniform
from mfd_fast.methods import MethodOptions, make_method
from mfd_fast.methods.base import Actors, Batch
from mfd_fast.methods.dmd2 import DistributionMatchingDistillation2, StudentStep, ar1
from mfd_fast.methods.senseflow import SenseFlow
from mfd_fast.streams import RowDraws, Share, make_generator
from mfd_fast.student import Student
from mfd_fast.types import Condition

CPU = torch.device("cpu")
TEACHER = Gaussian(1.3, 0.6)


def draws(rows: int, seed: int = 0) -> RowDraws:
    return RowDraws(make_generator(seed, "test"), Share(rows, 0, rows), CPU)


def linear_judge(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return 0.7 * x.flatten(1).sum(1) - t


def test_without_discriminator_and_norm_it_is_vsd_with_weight_t() -> None:
    t = torch.tensor([0.2, 0.5, 0.9])
    gradients = []
    for name, own in (("dmd2", {"gan_weight": 0.0, "normalise": False}), ("vsd", {"weight": "x0"})):
        affine = Affine(-1.0, 0.8)
        actors = Actors(TEACHER, affine.law(), Student(affine, (1,)))
        method = make_method(name, MethodOptions(own=own))
        loss = method.student_loss(actors, Batch(DesignedDraws(t, t), {})).value
        gradients.append(torch.stack(torch.autograd.grad(loss, [affine.a, affine.b])))
    assert torch.equal(*gradients)


def test_direction_is_divided_by_the_distance_to_the_teachers_prediction() -> None:
    t = torch.tensor([0.5])
    affine = Affine(-1.0, 0.8)
    actors = Actors(TEACHER, affine.law(), Student(affine, (1,)))
    actual = (
        make_method("dmd2", MethodOptions(own={"gan_weight": 0.0}))
        .student_loss(actors, Batch(DesignedDraws(t, t, side=4), {}))
        .value.item()
    )
    again = DesignedDraws(t, t, side=4)
    x0, e = -1.0 + 0.8 * again.normal((1,)), again.normal((1,))
    x_t, times = 0.5 * x0 + 0.5 * e, t.expand(16)
    teacher, auxiliary = TEACHER(x_t, times), affine.law()(x_t, times)
    direction = 0.5 * (teacher - auxiliary) / (x0 - (x_t - 0.5 * teacher)).abs()
    assert actual == pytest.approx(0.5 * direction.square().mean().item(), rel=1e-5)


def test_losses_of_the_discriminator() -> None:
    affine = Affine(-1.0, 0.8)
    actors = Actors(TEACHER, affine.law(), Student(affine, (1,)), linear_judge)
    real = 1.3 + 0.6 * torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    method = DistributionMatchingDistillation2(MethodOptions(own={"gan_weight": 0.5, "discriminator_weight": 2.0}))
    fake = -1.0 + 0.8 * torch.randn(64, 1, generator=torch.Generator().manual_seed(1))
    loss = method.auxiliary_loss(actors, Batch(draws(64), {}, data=real), fake)
    same = draws(64)
    e, t_aux = same.normal((1,)), same.times(method.options.auxiliary_law)
    t = same.times(Uniform())
    noised_fake, noised_real = ((1 - t[:, None]) * x + t[:, None] * same.normal((1,)) for x in (fake, real))
    d_fake, d_real = linear_judge(noised_fake, t, {}), linear_judge(noised_real, t, {})
    expected = (nn.functional.softplus(d_fake) + nn.functional.softplus(-d_real)).mean()
    assert loss.discriminator is not None
    assert loss.discriminator.item() == pytest.approx(2 * expected.item(), rel=1e-5)
    x_t = (1 - t_aux[:, None]) * fake + t_aux[:, None] * e
    flow = (affine.law()(x_t, t_aux) - (e - fake)).square().mean()
    assert loss.value.item() == pytest.approx(flow.item() + loss.discriminator.item(), rel=1e-5)
    frozen = DistributionMatchingDistillation2(MethodOptions(own={"features": "teacher"}))
    apart = frozen.auxiliary_loss(actors, Batch(draws(64), {}, data=real), fake)
    assert apart.value.item() == pytest.approx(flow.item(), rel=1e-5)


def test_the_generators_loss_moves_samples_to_higher_logits() -> None:
    affine = Affine(0.0, 0.8)
    # Teacher and auxiliary agree, so nothing but the discriminator pulls; it prefers larger samples.
    actors = Actors(affine.law(), affine.law(), Student(affine, (1,)), linear_judge)
    for name in ("dmd2", "senseflow"):
        method = make_method(name, MethodOptions(own={"isg_weight": 0.0} if name == "senseflow" else {}))
        loss = method.student_loss(actors, Batch(draws(256), {}, data=torch.zeros(256, 1))).value
        (along_a,) = torch.autograd.grad(loss, affine.a)
        assert along_a.item() < -1e-4, name


def test_ar1_of_a_linear_discriminator() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, generator=generator), torch.randn(200_000, 3, generator=generator)
    noise = torch.randn(200_000, 3, generator=generator)
    penalty = ar1(x @ weight, (x + 0.1 * noise) @ weight).item()
    assert penalty == pytest.approx(0.01 * weight.square().sum().item(), rel=0.02)


class Counting(nn.Module):
    """A student that remembers the times it was asked at and whether a gradient was wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.calls: list[tuple[float, bool]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append((t[0].item(), torch.is_grad_enabled()))
        return self.scale * x


def test_backward_simulation_runs_the_students_own_steps() -> None:
    method = DistributionMatchingDistillation2(MethodOptions(own={"gan_weight": 0.0}))
    seen = set()
    for seed in range(12):
        network = Counting()
        student = Student(network, (2,), steps=4, gamma=1.0)
        batch = Batch(draws(8, seed), {})
        step = method.student_step(Actors(TEACHER, TEACHER, student), batch, torch.ones(8, 2), with_gradient=True)
        times = [time for time, _ in network.calls]
        assert times == [1.0, 0.75, 0.5, 0.25][: len(times)]
        assert [grad for _, grad in network.calls] == [False] * (len(times) - 1) + [True]
        assert (step.now, step.then) == (times[-1], times[-1] - 0.25)
        assert torch.allclose(step.data, step.x - step.now * 0.5 * step.x)
        seen.add(len(times))
    assert seen == {1, 2, 3, 4}


def test_without_simulation_the_students_input_is_noised_data() -> None:
    method = DistributionMatchingDistillation2(MethodOptions(own={"simulation_share": 0.0}))
    real = torch.full((8, 2), 3.0)
    for seed in range(6):
        network = Counting()
        actors = Actors(TEACHER, TEACHER, Student(network, (2,), steps=2, gamma=1.0))
        step = method.student_step(actors, Batch(draws(8, seed), {}, data=real), torch.ones(8, 2))
        assert len(network.calls) == 1
        torch.testing.assert_close(step.x, torch.full((8, 2), 3.0 * (1 - step.now) + step.now))


@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
def test_implicit_alignment_moves_the_auxiliary_towards_the_student(decay: float) -> None:
    auxiliary, student = nn.Linear(3, 2), nn.Linear(3, 2)
    before = [weight.detach().clone() for weight in auxiliary.parameters()]
    method = SenseFlow(MethodOptions(own={"ida_decay": decay}))
    method.after_student_update(list(auxiliary.parameters()), list(student.parameters()))
    for after, was, other in zip(auxiliary.parameters(), before, student.parameters(), strict=True):
        if decay in (0.0, 1.0):
            assert torch.equal(after, was if decay else other)
        torch.testing.assert_close(after, decay * was + (1 - decay) * other)


def test_segment_target_follows_the_teacher_then_the_student() -> None:
    flow = Gaussian(1.3, 0.6)
    student = Student(GaussianMap(1.3, 0.6, end=0.0), (1,))
    method = SenseFlow(MethodOptions(own={"gan_weight": 0.0}))
    x = torch.randn(16, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one = torch.ones(16, dtype=torch.float64)
    step = StudentStep(x, 1.0, 0.0, student.jump(x, 1.0, 0.0, {}))
    batch = Batch(draws(16), {})
    # At both ends of the segment: the student's own step; the teacher's.
    actors = Actors(flow, flow, student)
    torch.testing.assert_close(method.segment_target(actors, batch, step, one), step.data.detach())
    torch.testing.assert_close(method.segment_target(actors, batch, step, 0 * one), x - flow(x, one))
    # Close to the start an exact student agrees with the teacher: the target is where it goes anyway.
    errors = [
        (method.segment_target(actors, batch, step, (1 - h) * one) - step.data).abs().max().item() for h in (0.1, 0.05)
    ]
    assert errors[1] < 0.3 * errors[0] < 0.3


def test_guidance_is_drawn_from_its_range() -> None:
    method = SenseFlow(MethodOptions(own={"guidance_range": [2.0, 8.0]}))
    assert method.needs.negative_condition
    scale = method.teacher_scale(Batch(draws(1000), {}))
    assert isinstance(scale, Tensor)
    assert 2 <= scale.min().item() < 2.1
    assert 7.9 < scale.max().item() < 8
    with pytest.raises(ValueError, match=r"guidance_range must be empty or \[low, high\]; got \[3.0\]"):
        SenseFlow(MethodOptions(own={"guidance_range": [3.0]}))
