from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfd_fast.closed_forms import Gaussian
from mfd_fast.fields import autocast
from mfd_fast.student import Student


class Field(nn.Module):
    """A small smooth field whose steps do not commute."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)
        for parameter in self.parameters():
            parameter.data.normal_(std=0.7, generator=generator)

    def forward(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        velocity: Tensor = self.second(torch.tanh(self.first(torch.cat([x, t[:, None].to(x.dtype)], 1))))
        return velocity + condition["shift"] if condition else velocity


NOISE = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


def by_hand(field: Callable[..., Tensor], grid: list[float], grad_steps: int) -> Tensor:
    """Euler steps; only the last ``grad_steps`` leave a graph."""
    x = NOISE
    for index, (now, then) in enumerate(pairwise(grid)):
        if index < len(grid) - 1 - grad_steps:
            x = x.detach()
        x = x - (now - then) * field(x, torch.full((5,), now)).float()
        if index < len(grid) - 1 - grad_steps:
            x = x.detach()
    return x


def gradients(field: nn.Module, samples: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, samples.numel()).view_as(samples)
    return list(torch.autograd.grad((samples * weight).sum(), list(field.parameters())))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("grad_steps", [None, 1, 2, 4], ids=["all", "last", "last two", "all four"])
def test_gradient_goes_through_the_steps_that_were_asked_for(grad_steps: int | None, precision: str) -> None:
    field, dtype = Field(), PRECISIONS[precision]
    student = Student(autocast(field, dtype), (2,), steps=4, grad_steps=grad_steps)
    samples = student.generate(NOISE, {}, with_gradient=True)

    def uncached(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            return field(x, t)

    expected = by_hand(uncached, [1.0, 0.75, 0.5, 0.25, 0.0], grad_steps or 4)
    assert torch.equal(samples, expected)
    for ours, theirs in zip(gradients(field, samples), gradients(field, expected), strict=True):
        assert theirs.abs().max() > 0
        assert torch.equal(ours, theirs)


def test_fewer_steps_give_another_gradient() -> None:
    field = Field()
    through = {
        number: torch.cat(
            [
                part.flatten()
                for part in gradients(
                    field, Student(field, (2,), 4, grad_steps=number).generate(NOISE, {}, with_gradient=True)
                )
            ]
        )
        for number in (1, 2, 3, 4)
    }
    assert all((through[n] - through[n + 1]).norm() > 1e-3 for n in (1, 2, 3))


def test_samples_without_gradient_have_no_graph() -> None:
    assert not Student(Field(), (2,), 2).generate(NOISE, {}).requires_grad
    with torch.no_grad():
        assert Student(Field(), (2,), 2).generate(NOISE, {}, with_gradient=True).requires_grad


def test_one_step_is_noise_minus_velocity() -> None:
    field = Field()
    assert torch.equal(Student(field, (2,)).generate(NOISE, {}), NOISE - field(NOISE, torch.ones(5)).detach())


def test_shift_moves_the_steps_towards_noise() -> None:
    assert Student(Field(), (2,), 4).time_grid() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert Student(Field(), (2,), 4, shift=3.0).time_grid() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    seen: list[float] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        assert t.shape == (5,)
        seen.append(t[0].item())
        return t[:, None].expand_as(x)

    samples = Student(field, (2,), 4, shift=3.0).generate(NOISE, {})
    assert seen == pytest.approx([1.0, 0.9, 0.75, 0.5])
    torch.testing.assert_close(samples, NOISE - (0.1 * 1.0 + 0.15 * 0.9 + 0.25 * 0.75 + 0.5 * 0.5))


def test_the_same_seed_gives_the_same_samples() -> None:
    student = Student(Field(), (2,), 2)
    samples = student.sample(20, seed=3)
    assert samples.shape == (20, 2)
    assert samples.dtype == torch.float32
    assert not samples.requires_grad
    assert torch.equal(samples, student.sample(20, seed=3))
    assert not torch.equal(samples, student.sample(20, seed=4))


def test_the_global_generator_plays_no_part() -> None:
    student = Student(Field(), (2,), label_counts=(1, 2))
    torch.manual_seed(0)
    labels, samples = student.draw_condition(9, 1)["label"], Student(Field(), (2,)).sample(9, seed=1)
    torch.manual_seed(1)
    assert torch.equal(student.draw_condition(9, 1)["label"], labels)
    assert torch.equal(Student(Field(), (2,)).sample(9, seed=1), samples)


@pytest.mark.parametrize("batch_size", [1, 7, 20, 1000])
def test_samples_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    student = Student(Field(), (2,), 3)
    condition = {"shift": torch.arange(40.0).view(20, 2) / 40}
    torch.testing.assert_close(
        student.sample(20, condition, 3, batch_size), student.sample(20, condition, 3), rtol=0, atol=1e-6
    )


def test_labels_are_as_frequent_as_in_the_data() -> None:
    student = Student(Field(), (2,), label_counts=(600, 0, 300, 100))
    label = student.draw_condition(5000, seed=0)["label"]
    assert label.dtype == torch.int64
    assert torch.bincount(label, minlength=4).div(5000).tolist() == pytest.approx([0.6, 0.0, 0.3, 0.1], abs=0.02)
    assert Student(Field(), (2,)).draw_condition(5) == {}


def test_drawn_labels_reach_the_network() -> None:
    seen: list[Tensor] = []

    def field(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append(label)
        return torch.zeros_like(x)

    student = Student(field, (2,), label_counts=(1, 1, 1))
    student.sample(10, seed=2, batch_size=4)
    assert [len(label) for label in seen] == [4, 4, 2]
    assert torch.equal(torch.cat(seen), student.draw_condition(10, 2)["label"])
    student.sample(3, {"label": torch.tensor([2])})
    assert seen[-1].tolist() == [2, 2, 2], "one row is shared by all samples"


def test_conditions_may_nest_and_hold_more_than_tensors() -> None:
    def field(x: Tensor, t: Tensor, text: Any, scale: float) -> Tensor:
        return -scale * text["embedding"]

    embedding = torch.arange(10.0).view(5, 2)
    student = Student(field, (2,))
    condition = {"text": {"embedding": embedding}, "scale": 100.0}
    samples = student.sample(5, condition, batch_size=2)
    assert ((samples - 100 * embedding).abs() < 6).all()


@pytest.mark.parametrize("n", [0, -1])
def test_no_samples_are_refused(n: int) -> None:
    student = Student(Field(), (2,), label_counts=(1, 1))
    with pytest.raises(ValueError, match=f"n and batch_size must be positive, got n={n}"):
        student.sample(n)
    with pytest.raises(ValueError, match=f"n must be positive, got {n}"):
        student.draw_condition(n)
    with pytest.raises(ValueError, match="batch_size=0"):
        student.sample(1, batch_size=0)


def test_a_condition_with_other_rows_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"condition\['shift'\] must have leading dimension 5 .*or 1.*got shape \(4, 2\)"
    ):
        Student(Field(), (2,)).sample(5, {"shift": torch.zeros(4, 2)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2, "grad_steps": 3}, r"grad_steps must be None or lie in \[1, steps=2\], got 3"),
        ({"steps": 2, "grad_steps": 0}, r"grad_steps must be None or lie in \[1, steps=2\], got 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Student(Field(), (2,), **options)


def test_a_student_that_needs_data_says_so() -> None:
    student = Student(lambda x, t, past: x * past.view(-1, 1), (2,), condition_names=("past",))
    with pytest.raises(ValueError, match="this student needs past, one row for each sample; got None"):
        student.sample(3)
    assert student.sample(3, {"past": torch.ones(3)}).tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_exact_maps_keep_the_law_whatever_share_of_fresh_noise(gamma: float) -> None:
    """With the exact flow map of N(1.3, 0.6^2) any number of steps gives that law."""
    law = Gaussian(1.3, 0.6)

    def mean_velocity(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return law.mean_velocity(x, t, r)

    student = Student(mean_velocity, (1,), steps=4, gamma=gamma, second_time=True)
    samples = student.sample(40_000, seed=3)
    assert samples.mean().item() == pytest.approx(1.3, abs=0.01)
    assert samples.std().item() == pytest.approx(0.6, abs=0.01)
    one_step = Student(mean_velocity, (1,), second_time=True).sample(40_000, seed=3)
    assert torch.allclose(samples, one_step, atol=1e-4) == (gamma == 0), "only fresh noise makes other samples"


def test_fresh_noise_does_not_depend_on_the_batch_size() -> None:
    student = Student(lambda x, t: 0.5 * x, (2,), steps=3, gamma=1.0)
    assert torch.equal(student.sample(10, seed=1, batch_size=3), student.sample(10, seed=1))


def test_full_renoising_is_the_loop_of_consistency_models() -> None:
    noise, fresh = torch.randn(2, 8, 2)
    student = Student(lambda x, t: x * t[:, None], (2,), steps=2, gamma=1.0)
    data = noise - noise
    expected = (0.5 * data + 0.5 * fresh) * (1 - 0.5 * 0.5)
    torch.testing.assert_close(student.generate(noise, {}, fresh=lambda: fresh), expected)
    with pytest.raises(ValueError, match=r"gamma is 1\.0: a student of 2 steps needs fresh noise"):
        student.generate(noise, {})


def test_a_gamma_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 1.5"):
        Student(lambda x, t: x, (2,), gamma=1.5)
