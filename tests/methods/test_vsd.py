"""Variational score distillation on Gaussians: the gradient of a divergence, and descent that reaches the teacher."""

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import Affine, DesignedDraws

from mfd_fast.closed_forms import Gaussian
from mfd_fast.methods import MethodOptions, make_method
from mfd_fast.methods.base import Actors, Batch
from mfd_fast.methods.vsd import WEIGHTS
from mfd_fast.streams import RowDraws
from mfd_fast.student import Student

MEAN, STD = 1.3, 0.6
STARTS = {"narrow": (-2.0, 0.2), "wide": (-2.0, 1.5), "right-width": (-2.0, 0.6)}


def loss(name: str, affine: Any, draws: RowDraws, **own: Any) -> Tensor:
    """The student's loss with an exact auxiliary."""
    method = make_method(name, MethodOptions(own=own, rollout={"steps": 1}))
    actors = Actors(Gaussian(MEAN, STD), affine.law(), Student(affine, (1,)))
    return method.student_loss(actors, Batch(draws, {})).value


def gradient(affine: Any, value: Tensor) -> tuple[float, float]:
    return tuple(part.item() for part in torch.autograd.grad(value, [affine.a, affine.b]))  # type: ignore[return-value]


def divergence(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """KL of the student's law noised to t from the teacher's."""
    laws = [
        torch.distributions.Normal((1 - t) * m, ((1 - t) ** 2 * s**2 + t**2).sqrt()) for m, s in ((a, b), (MEAN, STD))
    ]
    return torch.distributions.kl_divergence(*laws)


@pytest.mark.parametrize(("a", "b"), [*STARTS.values(), (2.0, 0.4)])
def test_kl_weight_gives_the_gradient_of_the_kl(a: float, b: float) -> None:
    t = torch.tensor([0.2, 0.5, 0.9])
    affine = Affine(a, b)
    ours = gradient(affine, loss("vsd", affine, DesignedDraws(t, t), weight="kl"))
    exact = gradient(affine, divergence(affine.a, affine.b, t).mean())
    assert ours == pytest.approx(exact, rel=1e-3, abs=1e-4)


def test_velocity_weight_is_mean_flow_distillation_without_an_interval() -> None:
    t = torch.tensor([0.2, 0.5, 0.9])
    affine = Affine(-1.0, 0.8)
    ours = gradient(affine, loss("vsd", affine, DesignedDraws(t, t), weight="velocity"))
    assert ours == pytest.approx(gradient(affine, loss("mfd", affine, DesignedDraws(t, t))), rel=1e-5)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("name", "own", "rate"),
    [*(("vsd", {"weight": weight}, 0.5) for weight in WEIGHTS), ("dmd2", {"gan_weight": 0.0}, 0.2)],
    ids=[*WEIGHTS, "dmd2"],
)
def test_descent_with_an_exact_auxiliary_reaches_the_teacher(
    name: str, own: dict[str, Any], rate: float, start: str
) -> None:
    affine = Affine(*STARTS[start])
    t = torch.linspace(0.1, 0.9, 5)
    optimizer = torch.optim.SGD(affine.parameters(), rate)
    for update in range(250):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (250 - update) / 50)
        optimizer.zero_grad()
        torch.autograd.backward(loss(name, affine, DesignedDraws(t, t, side=4), **own))
        optimizer.step()
    assert (affine.a.item(), abs(affine.b.item())) == pytest.approx((MEAN, STD), abs=1e-3)  # -b is the same law


def test_weights_near_data_are_bounded() -> None:
    t = torch.tensor([0.005])
    affine = Affine(0.0, 1.0)
    small = loss("vsd", affine, DesignedDraws(t, t), weight="kl", min_time=0.5).item()
    large = loss("vsd", affine, DesignedDraws(t, t), weight="kl", min_time=0.01).item()
    # (1-t)^2 / t is 0.5 and 98.01; the surrogate's value is half the mean square of the weighted gap.
    assert large / small == pytest.approx((98.01 / 0.5) ** 2, rel=1e-3)
