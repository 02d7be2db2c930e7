import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from mfd_fast.config import OptimizerSettings
from mfd_fast.training.distributed import World
from mfd_fast.training.optimizing import RoleOptimizer, learning_rate


def make(parameters: Sequence[nn.Parameter], precision: str = "float32", **settings: object) -> RoleOptimizer:
    return RoleOptimizer(
        parameters,
        OptimizerSettings(**settings),  # type: ignore[arg-type]
        total_updates=10,
        precision=precision,
        world=World(),
    )


def rates(updates: int, total: int, **settings: object) -> list[float]:
    chosen = OptimizerSettings(learning_rate=2.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(chosen, update, total) for update in range(updates)]


def test_constant_rate() -> None:
    assert rates(5, 4) == [2.0] * 5


def test_warmup_rises_linearly_to_the_full_rate() -> None:
    assert rates(6, 100, warmup_updates=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_linear_rate() -> None:
    assert rates(5, 4, schedule="linear") == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])


def test_cosine_rate() -> None:
    expected = [1 + math.cos(math.pi * update / 4) for update in range(5)]
    assert rates(5, 4, schedule="cosine") == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_rate_ends_at_the_final_fraction_and_stays_there(schedule: str) -> None:
    assert rates(9, 4, schedule=schedule, final_fraction=0.25)[4:] == pytest.approx([0.5] * 5)


def test_warmup_multiplies_the_schedule() -> None:
    assert rates(3, 4, schedule="linear", warmup_updates=2) == pytest.approx([1.0, 1.5, 1.0])


def test_no_updates_is_no_division_by_zero() -> None:
    assert rates(1, 0, schedule="cosine", final_fraction=0.5) == [2.0]


def test_the_schedule_is_used() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = make([weight], name="adam", learning_rate=1.0, schedule="linear", clip_norm=None)
    moves = []
    for _ in range(3):
        before = weight.item()
        optimizer.backward(weight.sum(), 1)
        report = optimizer.step()
        moves.append((before - weight.item(), report.learning_rate))
    # Adam moves by the learning rate when the gradient is constant.
    assert [rate for _, rate in moves] == pytest.approx([1.0, 0.9, 0.8])
    assert [move for move, _ in moves] == pytest.approx([1.0, 0.9, 0.8], rel=1e-4)


@pytest.mark.parametrize(("limit", "moved"), [(1.0, (0.6, 0.8)), (None, (3.0, 4.0)), (10.0, (3.0, 4.0))])
def test_clipping_scales_to_the_global_norm(limit: float | None, moved: tuple[float, float]) -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    # A large eps makes Adam's move proportional to the gradient: lr * g / eps after one update.
    settings = {"name": "adam", "learning_rate": 1e6, "eps": 1e6, "clip_norm": limit}
    optimizer = make([first, second], **settings)
    optimizer.backward((3 * first + 4 * second).sum(), 1)
    report = optimizer.step()
    assert report.grad_norm.item() == pytest.approx(5.0)
    assert (-first.item(), -second.item()) == pytest.approx(moved, rel=1e-4)


def test_parts_of_a_batch_add_up_to_their_mean() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = make([weight], clip_norm=None)
    for factor in (1.0, 2.0, 6.0):
        optimizer.backward((factor * weight).sum(), 3)
    assert optimizer.step().grad_norm.item() == pytest.approx(3.0)
    optimizer.backward(weight.sum(), 1)
    assert optimizer.step().grad_norm.item() == pytest.approx(1.0), "the gradient of the update before is forgotten"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("limit", [1.0, None])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, precision: str, limit: float | None) -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = make([weight], precision, clip_norm=limit, weight_decay=0.1)
    optimizer.backward(weight.sum(), 1)
    assert not optimizer.step().skipped
    kept, state = weight.detach().clone(), {name: value.clone() for name, value in optimizer.tensors().items()}
    optimizer.backward((weight * torch.tensor([1.0, bad])).sum(), 1)
    report = optimizer.step()
    assert report.skipped
    assert not math.isfinite(report.grad_norm.item())
    assert torch.equal(weight, kept)
    assert all(torch.equal(value, state[name]) for name, value in optimizer.tensors().items())
    optimizer.backward(weight.sum(), 1)
    assert not optimizer.step().skipped
    assert bool(weight.isfinite().all())
    assert optimizer.updates == 3


def test_the_loss_scale_falls_when_a_gradient_overflows() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = make([weight], "float16")
    before = optimizer.numbers()["loss_scale"]["scale"]
    optimizer.backward((weight * math.inf).sum(), 1)
    optimizer.step()
    assert optimizer.numbers()["loss_scale"]["scale"] == before / 2
    optimizer.backward(3 * weight.sum(), 1)
    assert optimizer.step().grad_norm.item() == pytest.approx(3.0), "gradients are unscaled before they are measured"


@pytest.mark.parametrize(("name", "decayed"), [("adam", False), ("adamw", True)])
def test_weight_decay_is_decoupled_for_adamw(name: str, decayed: bool) -> None:
    weight = nn.Parameter(torch.tensor([100.0]))
    optimizer = make([weight], name=name, learning_rate=0.1, weight_decay=0.5)
    optimizer.backward(weight.sum(), 1)
    optimizer.step()
    assert weight.item() == pytest.approx(100 * (1 - 0.05) - 0.1 if decayed else 99.9, abs=1e-3)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_loaded_optimizer_continues_with_the_same_bits(precision: str) -> None:
    def run(updates: range, optimizer: RoleOptimizer, weights: list[nn.Parameter]) -> None:
        for update in updates:
            if update == 1:  # the loss scale of float16 falls
                optimizer.backward((weights[0] * math.inf).sum(), 1)
                assert optimizer.step().skipped
            used = weights[: 1 if update < 3 else 2]  # the second weight gets its first gradient late
            optimizer.backward(sum(((w - update) ** 2).sum() for w in used), 1)  # type: ignore[arg-type]
            optimizer.step()

    def fresh() -> list[nn.Parameter]:
        return [nn.Parameter(torch.full((3,), 0.3)), nn.Parameter(torch.full((2,), 0.7))]

    settings = {"schedule": "cosine", "warmup_updates": 3, "weight_decay": 0.1}
    whole = fresh()
    undisturbed = make(whole, precision, **settings)
    run(range(8), undisturbed, whole)
    parts = fresh()
    first = make(parts, precision, **settings)
    run(range(2), first, parts)
    second = make(parts, precision, **settings)
    second.load({name: value.clone() for name, value in first.tensors().items()}, first.numbers())
    run(range(2, 8), second, parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))
    assert second.numbers() == undisturbed.numbers()


def test_state_names_are_index_and_name() -> None:
    weights = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    optimizer = make(weights)
    assert optimizer.tensors() == {}
    optimizer.backward(weights[1].sum(), 1)
    optimizer.step()
    names: dict[str, Tensor] = optimizer.tensors()
    assert set(names) == {"1.step", "1.exp_avg", "1.exp_avg_sq"}
