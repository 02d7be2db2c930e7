"""The other ways of integrating give the numbers they are compared for."""

from typing import Any

import pytest
import torch
from torch import nn

import mfd_fast
from contenders import Diffrax, DiffraxChoice, Own, Run, euler, released_loop, torch_peers
from fields import NO_LABEL, Pair
from mfd_fast.intervals import Uniform, sample_pairs
from mfd_fast.models import build_model
from peers import loops
from peers.guided import guided
from peers.libraries import torchdiffeq_lock_step
from search import DIFFRAX_GRID
from workload import Draw, conditions, gradient_error


def network(seed: int, name: str = "mlp", **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    built = build_model(name, (1, 4, 4), num_classes=10, **options).requires_grad_(False)
    for parameter in built.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape))
    return built


@pytest.fixture
def pair() -> Pair:
    return Pair(network(0, width=16, depth=2), network(1, width=16, depth=2), {})


@pytest.fixture
def draw() -> Draw:
    generator = torch.Generator().manual_seed(0)
    t, r = sample_pairs(Uniform(), 5, generator=generator)
    return Draw(torch.randn(5, 1, 4, 4, generator=generator), t, r, torch.tensor([0, 3, 9, 1, 3]))


def runs(pair: Pair) -> dict[str, Run]:
    return {way.name: way.run for way in torch_peers(pair) if way.same_numbers}


@pytest.mark.parametrize(
    "name", ["torchdiffeq Euler 0.02, same numbers", "torchode Euler 0.02", "eager lock-step Euler 0.02",
             "row by row Euler 0.02"]
)  # fmt: skip
def test_same_numbers(name: str, pair: Pair, draw: Draw) -> None:
    if name.startswith("torchode"):
        pytest.importorskip("torchode", reason="torchode is an extra")
    expected = Own(pair).way(euler(), runner="eager").run(draw)
    for u, own in zip(runs(pair)[name](draw), expected, strict=True):
        torch.testing.assert_close(u, own, rtol=1e-4, atol=1e-4)
    assert gradient_error(expected, Own(pair).way(euler(0.1), runner="eager").run(draw)) > 1e-2


def test_rescaled_lock_step_takes_the_steps_of_the_widest_row(pair: Pair, draw: Draw) -> None:
    field = guided(pair.teacher, 4.5, NO_LABEL)
    longest = int(loops.steps_of(draw.t, draw.r, 0.05).max())
    assert longest > int(loops.steps_of(draw.t, draw.r, 0.05).min())
    with torch.no_grad():
        u = torchdiffeq_lock_step(field, *draw, 0.05)
    own = mfd_fast.mean_velocity(pair.teacher, draw.x, draw.t, draw.r, steps=longest, **conditions(draw))
    torch.testing.assert_close(u, own, rtol=1e-4, atol=1e-4)


def test_released_loop_rounds_times_to_thousandths(pair: Pair, draw: Draw) -> None:
    own, loop = Own(pair).way(euler(), runner="eager"), released_loop(pair, torch.float32)
    for t, r, exact in ((0.7, 0.1, True), (0.7004, 0.1004, False)):
        moved = draw._replace(t=torch.full((5,), t), r=torch.full((5,), r))
        error = gradient_error(loop.run(moved), own.run(moved))
        assert (error < 1e-4) == exact
        assert error < 0.05


@pytest.mark.parametrize(
    "built", [network(2, width=16, depth=2), network(3, "dit", width=16, depth=2, heads=2)], ids=["mlp", "dit"]
)
def test_networks_in_jax(built: nn.Module) -> None:
    pytest.importorskip("diffrax", reason="diffrax and jax are extras")
    import jax

    from peers.jax_networks import to_jax, to_torch, translate

    x, t, label = torch.randn(3, 1, 4, 4), torch.rand(3), torch.tensor([0, 10, 4])
    field, parameters = translate(built)
    u = jax.vmap(field, (None, 0, 0, 0))(parameters, *(to_jax(part) for part in (x, t, label)))
    torch.testing.assert_close(to_torch(u), built(x, t, label=label), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("choices", "options"),
    [
        (
            [DiffraxChoice("rows", "Euler", 0.05), DiffraxChoice("rows", "Euler", 0.1)],
            {"step_size": 0.05, "auxiliary_step_size": 0.1},
        ),
        ([DiffraxChoice("rescaled", "Midpoint", 3)], {"steps": 3, "solver": "midpoint"}),
    ],
    ids=["rows", "rescaled"],
)
def test_diffrax(choices: list[DiffraxChoice], options: dict[str, Any], pair: Pair, draw: Draw) -> None:
    pytest.importorskip("diffrax", reason="diffrax and jax are extras")
    u = Diffrax(pair).way(*choices).run(draw)
    own = mfd_fast.mean_velocity_pair(pair.teacher, pair.auxiliary, *draw[:3], **options, **conditions(draw))
    for ours, theirs in zip(own, u, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


def test_diffrax_with_tolerance(pair: Pair, draw: Draw) -> None:
    diffrax = pytest.importorskip("diffrax", reason="diffrax and jax are extras")
    assert all(hasattr(diffrax, choice.solver) for choices in DIFFRAX_GRID.values() for choice in choices)
    fine = mfd_fast.mean_velocity_pair(
        pair.teacher, pair.auxiliary, *draw[:3], solver="rk4", step_size=0.02, **conditions(draw)
    )
    u = Diffrax(pair).way(DiffraxChoice("adaptive", "Bosh3", 1e-4)).run(draw)
    assert gradient_error(u, fine) < 1e-2
