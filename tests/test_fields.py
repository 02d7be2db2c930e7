"""Fields of other conventions against closed forms, and networks under autocast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfd_fast import SharedBackbone, mean_velocity
from mfd_fast.closed_forms import Gaussian, GaussianMixture
from mfd_fast.fields import (
    Autocast,
    autocast,
    from_data_prediction,
    from_noise_prediction,
    negated,
    reversed_time,
    scaled_time,
    time_range_of,
)
from mfd_fast.models import build_model
from mfd_fast.models.lora import LoRARoles
from mfd_fast.path import noise_prediction

LAWS = {
    "gaussian": Gaussian([1.3, -0.4], [0.6, 1.7]),
    "mixture": GaussianMixture([0.5, 0.5], [[1.5, 0.0], [-1.0, 1.0]], [0.5, 0.8]),
}
Law = Gaussian | GaussianMixture


def _wrapped(name: str, law: Law) -> Callable[..., Tensor]:
    """The law as networks of other conventions would have it, wrapped back."""

    def reversed_network(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return -law(x, 1 - t)  # 0 = noise, 1 = data, velocity data - noise

    def thousands(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        assert float(t.max()) > 10
        return law(x, t / 1000)

    def noise_network(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return noise_prediction(x, t, law(x, t))

    def data_network(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return law.data_prediction(x, t)

    wrapped: dict[str, Callable[..., Tensor]] = {
        "reversed": reversed_time(reversed_network),
        "scaled": scaled_time(thousands, 1000.0),
        "data": from_data_prediction(data_network),
        "noise": from_noise_prediction(noise_network),
        "reversed-and-scaled": reversed_time(
            scaled_time(lambda x, t, **condition: reversed_network(x, t / 1000), 1000.0)
        ),
    }
    return wrapped[name]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ["reversed", "scaled", "data", "noise", "reversed-and-scaled"])
def test_other_conventions_give_the_same_field(name: str, law: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    t = 0.05 + 0.9 * torch.rand(20, generator=generator, dtype=torch.float64)
    field = _wrapped(name, LAWS[law])
    torch.testing.assert_close(field(x, t), LAWS[law](x, t), rtol=1e-10, atol=1e-10)
    expected = mean_velocity(LAWS[law], x, t, 0.1, steps=5)
    torch.testing.assert_close(mean_velocity(field, x, t, 0.1, steps=5), expected, rtol=1e-9, atol=1e-9)


def test_predictions_stay_finite_at_the_ends() -> None:
    law, x = LAWS["gaussian"], torch.randn(2, 2)
    at_data = _wrapped("data", law)(x, torch.zeros(2))
    at_noise = _wrapped("noise", law)(x, torch.ones(2))
    assert bool(at_data.isfinite().all())
    assert bool(at_noise.isfinite().all())
    coarse = from_data_prediction(lambda x, t: torch.zeros_like(x), min_time=0.5)
    torch.testing.assert_close(coarse(x, torch.tensor([0.1, 0.8])), x / torch.tensor([[0.5], [0.8]]))
    coarse = from_noise_prediction(lambda x, t: torch.zeros_like(x), min_time=0.5)
    torch.testing.assert_close(coarse(x, torch.tensor([0.9, 0.2])), -x / torch.tensor([[0.5], [0.8]]))


@pytest.mark.parametrize(
    "wrap",
    [
        reversed_time,
        negated,
        lambda field: scaled_time(field, 2.0),
        from_data_prediction,
        from_noise_prediction,
        lambda field: autocast(field, torch.bfloat16),
    ],
    ids=["reversed", "negated", "scaled", "data", "noise", "autocast"],
)
def test_conditions_pass_through(wrap: Callable[[Any], Callable[..., Tensor]]) -> None:
    seen: dict[str, Any] = {}

    def field(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        seen.update(condition)
        return x

    label = torch.arange(3)
    wrap(field)(torch.ones(3, 2), torch.full((3,), 0.5), label=label, nested={"scale": 2})
    assert seen == {"label": label, "nested": {"scale": 2}}


class _Ranged:
    time_range = (0.02, 0.9)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (reversed_time, (0.1, 0.98)),
        (negated, (0.02, 0.9)),
        (lambda field: scaled_time(field, 0.5), (0.04, 1.8)),
        (from_data_prediction, (0.02, 0.9)),
        (from_noise_prediction, (0.02, 0.9)),
        (lambda field: autocast(field, torch.bfloat16), (0.02, 0.9)),
    ],
    ids=["reversed", "negated", "scaled", "data", "noise", "autocast"],
)
def test_a_declared_range_of_times_is_kept(wrap: Any, expected: tuple[float, float]) -> None:
    assert wrap(_Ranged()).time_range == pytest.approx(expected)
    assert wrap(lambda x, t: x).time_range is None
    assert time_range_of(object()) is None
    with pytest.raises(ValueError, match="t must lie in the field's time_range"):
        mean_velocity(wrap(_Ranged()), torch.ones(1, 1), expected[1] + 0.01, 0.5)


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.dtypes.append(t.dtype)
        velocity: Tensor = self.linear(x)
        return velocity


def test_autocast_covers_the_network_only() -> None:
    module, x, t = _Linear(), torch.randn(4, 3), torch.rand(4)
    field = autocast(module, torch.bfloat16)
    assert field(x, t).dtype == torch.bfloat16
    assert module(x, t).dtype == torch.float32
    assert mean_velocity(field, x, 1.0, 0.0, steps=2).dtype == torch.float32
    assert set(module.dtypes) == {torch.float32}
    assert autocast(module, None) is module


@pytest.mark.parametrize("outer", [False, True], ids=["alone", "inside-autocast"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_a_rollout_does_not_cost_later_calls_their_gradients(outer: bool, wrapped: bool) -> None:
    """Autocast keeps casts of weights; one made without gradients must not be used where they are wanted."""
    module, x, t = _Linear(), torch.randn(4, 3), torch.rand(4)
    field = autocast(module, torch.bfloat16) if wrapped else module
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
        mean_velocity(field, x, 1.0, 0.0, steps=2)
        field(x, t).float().square().sum().backward()
    assert module.linear.weight.grad is not None
    assert bool(module.linear.weight.grad.any())


def test_autocast_of_a_role_stays_a_role() -> None:
    module = build_model("mlp", (3,), width=8, depth=1)
    nn.init.normal_(module.get_submodule("leave").weight)  # type: ignore[arg-type]
    roles = LoRARoles(module, rank=1, alpha=1.0)
    teacher, auxiliary = (autocast(role, torch.bfloat16) for role in (roles.teacher, roles.auxiliary))
    assert isinstance(teacher, SharedBackbone)
    assert isinstance(auxiliary, SharedBackbone)
    assert teacher.backbone is auxiliary.backbone
    assert not isinstance(autocast(module, torch.bfloat16), SharedBackbone)
    assert isinstance(autocast(module, torch.bfloat16), Autocast)
    x, t = torch.randn(4, 3), torch.rand(4)
    torch.testing.assert_close(teacher(x, t).float(), module(x, t), rtol=3e-2, atol=3e-2)
    assert not torch.equal(teacher(x, t).float(), module(x, t))
