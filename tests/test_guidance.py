"""Classifier-free guidance as a wrapper."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast import mean_velocity
from mfd_fast.closed_forms import Gaussian
from mfd_fast.guidance import combine, complete_negative, guide
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.models.lora import LoRARoles
from mfd_fast.solvers import SOLVERS
from mfd_fast.types import RowGroup

LAWS = [Gaussian([1.3, -0.4], [0.6, 1.7]), Gaussian([-1.0, 0.0], [1.0, 0.5])]
T, R = torch.tensor([0.9, 0.2, 0.5, 0.7]), torch.tensor([0.1, 0.8, 0.5, 0.6])


class _Field:
    """Two laws, chosen by label, and a push by the mean of a text of any length."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, *, label: Tensor, text: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        velocity = torch.where((label == 0)[:, None], LAWS[0](x, t), LAWS[1](x, t))
        return velocity if text is None else velocity + text.mean(1, keepdim=True)


def _points() -> Tensor:
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


def _by_hand(scale: Any, condition: dict[str, Any], negative: dict[str, Any], **kwargs: Any) -> Tensor:
    """The guided field written out, integrated as one field."""
    scale = torch.as_tensor(scale).expand(4)

    def field(x: Tensor, t: Tensor, *, scale: Tensor, first: Any, second: Any) -> Tensor:
        conditional, unconditional = _Field()(x, t, **first), _Field()(x, t, **second)
        return unconditional + scale[:, None] * (conditional - unconditional)

    arguments = {"scale": scale, "first": condition, "second": {**condition, **negative}}
    result: Tensor = mean_velocity(field, _points(), T, R, condition=arguments, **kwargs)
    return result


LABELS = {"label": torch.tensor([0, 1, 0, 1])}
NEGATIVE = {"label": torch.tensor([1])}


@pytest.mark.parametrize("how", [*SOLVERS, "bosh3-adaptive"])
def test_guided_equals_by_hand(how: str) -> None:
    kwargs: dict[str, Any] = {"solver": how.removesuffix("-adaptive")}
    kwargs |= {} if how == "bosh3-adaptive" else {"steps": 5}
    u = mean_velocity(
        _Field(), _points(), T, R, condition=LABELS, negative_condition=NEGATIVE, guidance_scale=4.5, **kwargs
    )
    torch.testing.assert_close(u, _by_hand(4.5, LABELS, NEGATIVE, **kwargs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "scale",
    [
        pytest.param(0.0, id="zero"),
        pytest.param(3, id="int"),
        pytest.param(-1.5, id="negative"),
        pytest.param(torch.tensor(2.5), id="0-d"),
        pytest.param(torch.tensor([2.5]), id="one-row"),
        pytest.param(torch.tensor([0.0, 1.0, 2.5, 7.0]), id="a-scale-per-row"),
        pytest.param(torch.tensor([0, 1, 2, 7]), id="whole-scales"),
        pytest.param(torch.tensor([0.0, 1.0, 2.5, 7.0], dtype=torch.float64), id="float64-scales"),
    ],
)
def test_forms_of_the_scale(scale: Any) -> None:
    u = mean_velocity(
        _Field(), _points(), T, R, condition=LABELS, negative_condition=NEGATIVE, guidance_scale=scale, steps=6
    )
    assert u.dtype == torch.float32
    scale = scale.float() if isinstance(scale, Tensor) else float(scale)
    torch.testing.assert_close(u, _by_hand(scale, LABELS, NEGATIVE, steps=6), rtol=1e-5, atol=1e-5)


def test_no_guidance_costs_no_evaluation() -> None:
    field = _Field()
    u, stats = mean_velocity(
        field,
        _points(),
        T,
        R,
        condition=LABELS,
        negative_condition=NEGATIVE,
        guidance_scale=1.0,
        steps=3,
        return_stats=True,
    )
    assert torch.equal(u, mean_velocity(_Field(), _points(), T, R, condition=LABELS, steps=3))
    assert field.rows == [4, 3, 3]
    assert stats.evaluations.tolist() == [3, 3, 1, 3]


def test_scale_zero_is_the_negative_condition() -> None:
    u = mean_velocity(
        _Field(), _points(), T, R, condition=LABELS, negative_condition=NEGATIVE, guidance_scale=0.0, steps=3
    )
    expected = mean_velocity(_Field(), _points(), T, R, condition=NEGATIVE, steps=3)
    torch.testing.assert_close(u, expected, rtol=1e-6, atol=1e-6)


def test_names_the_negative_condition_lacks_come_from_the_condition() -> None:
    text = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    condition = LABELS | {"text": text}
    kwargs: dict[str, Any] = {"guidance_scale": 3.0, "steps": 4}
    short = mean_velocity(_Field(), _points(), T, R, condition=condition, negative_condition=NEGATIVE, **kwargs)
    full = NEGATIVE | {"text": text}
    assert torch.equal(
        short, mean_velocity(_Field(), _points(), T, R, condition=condition, negative_condition=full, **kwargs)
    )
    torch.testing.assert_close(short, _by_hand(3.0, condition, full, steps=4), rtol=1e-5, atol=1e-5)
    assert complete_negative(condition, NEGATIVE)["text"] is text


@pytest.mark.parametrize(
    ("negative", "together"),
    [
        pytest.param({"text": torch.zeros(4, 3)}, True, id="rows"),
        pytest.param({"text": torch.zeros(1, 3)}, True, id="shared"),
        pytest.param({"text": torch.zeros(1, 5)}, False, id="another-length"),
        pytest.param({"text": torch.zeros(1, 3, dtype=torch.float64)}, False, id="another-dtype"),
        pytest.param({"text": None}, False, id="no-text"),
    ],
)
def test_one_batch_where_the_conditions_allow_it(negative: dict[str, Any], together: bool) -> None:
    field = _Field()
    condition = LABELS | {"text": torch.randn(4, 3, generator=torch.Generator().manual_seed(1))}
    u, stats = mean_velocity(
        field,
        _points(),
        T,
        R,
        condition=condition,
        negative_condition=negative,
        guidance_scale=3.0,
        steps=2,
        return_stats=True,
    )
    assert field.rows == ([8, 6] if together else [4, 4, 3, 3])
    assert int(stats.evaluations.sum()) == sum(field.rows)
    torch.testing.assert_close(u, _by_hand(3.0, condition, negative, steps=2).float(), rtol=1e-5, atol=1e-5)


def test_a_network_on_digits(digits_teacher: VelocityNetwork) -> None:
    """Guidance by label, against two calls of the network at each step of a plain loop."""
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([4, 0, 9])
    u = mean_velocity(
        digits_teacher,
        x,
        1.0,
        0.2,
        steps=4,
        condition={"label": label},
        negative_condition={"label": torch.tensor([10])},
        guidance_scale=4.5,
    )
    y = x
    for step in range(4):
        t = torch.full((3,), 1 - 0.2 * step)
        plain = digits_teacher(y, t)
        y = y - 0.2 * (plain + 4.5 * (digits_teacher(y, t, label=label) - plain))
    torch.testing.assert_close(u, (x - y) / 0.8, rtol=1e-4, atol=1e-4)


def test_roles_are_guided_in_one_forward(digits_teacher: VelocityNetwork) -> None:
    roles = LoRARoles(digits_teacher, rank=2, alpha=1.0)
    rows: list[int] = []
    roles.network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    x, kwargs = torch.randn(3, 1, 8, 8), {"steps": 4, "guidance_scale": 4.5}
    condition = {"label": torch.tensor([4, 0, 9])}
    negative = {"label": torch.tensor([10])}
    arguments: dict[str, Any] = {"condition": condition, "negative_condition": negative, **kwargs}
    u = mean_velocity(roles.teacher, x, 1.0, 0.2, **arguments)
    assert rows == [6] * 4
    torch.testing.assert_close(u, mean_velocity(digits_teacher, x, 1.0, 0.2, **arguments), rtol=1e-6, atol=1e-6)


def test_a_shared_backbone_is_given_both_groups() -> None:
    class Shared:
        backbone = object()

        def __call__(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
            raise AssertionError("groups of rows belong to the backbone")

        def evaluate_groups(self, groups: list[RowGroup]) -> list[Tensor]:
            assert all(group.field is self for group in groups)
            return [_Field()(group.x, group.t, **group.condition) for group in groups]

    kwargs: dict[str, Any] = {"condition": LABELS, "negative_condition": NEGATIVE, "guidance_scale": 2.0, "steps": 3}
    expected = mean_velocity(_Field(), _points(), T, R, **kwargs)
    torch.testing.assert_close(mean_velocity(Shared(), _points(), T, R, **kwargs), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 1, 2, 2)], ids=str)
def test_combine(shape: tuple[int, ...]) -> None:
    conditional, negative = torch.randn(2, *shape).bfloat16()
    scale = torch.tensor([0.0, 1.0, 3.0, -1.0])
    found = combine(conditional, negative, scale)
    assert found.dtype == torch.float32
    for row in range(4):
        expected = negative[row].float() + scale[row] * (conditional[row].float() - negative[row].float())
        assert torch.equal(found[row], expected)


def test_guide_leaves_an_unguided_field_alone() -> None:
    field = _Field()
    assert guide(field, LABELS, None, 1.0, _points()) == (field, LABELS, 1)
    assert guide(field, LABELS, NEGATIVE, 1, _points()) == (field, LABELS, 1)
