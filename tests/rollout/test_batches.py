"""A batch of mixed intervals gives each row what it would get alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast import integrate, mean_velocity
from mfd_fast.closed_forms import Gaussian, GaussianMixture
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.solvers import SOLVERS

ROWS = 40
FIELDS = {
    "gaussian": Gaussian([1.3, -0.4, 0.2], [0.6, 1.7, 1.0]),
    "mixture": GaussianMixture([1.0, 2.0], [[-1.0, 0.5, 0.0], [1.0, -0.5, 2.0]], [0.3, 0.8]),
}
HOW: dict[str, dict[str, Any]] = {
    **{
        name: {"solver": name, "steps" if name == "bosh3" else "step_size": 4 if name == "bosh3" else 0.1}
        for name in SOLVERS
    },
    "bosh3-adaptive": {"solver": "bosh3", "rtol": 1e-4, "atol": 1e-5},
    "bosh3-max-step": {"solver": "bosh3", "step_size": 0.05},
    "euler-budget": {"solver": "euler", "step_size": 0.1, "max_evaluations": 4, "return_stats": True},
    "bosh3-budget": {"solver": "bosh3", "rtol": 1e-5, "max_evaluations": 13, "return_stats": True},
}


def _batch(rows: int, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, *shape, generator=generator, dtype=dtype)
    t, r = torch.rand(2, rows, generator=generator, dtype=dtype)
    r[::9] = t[::9]
    return x, t, r


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("how", HOW)
def test_rows_of_closed_forms_get_the_same_bits(how: str, field: str) -> None:
    x, t, r = _batch(ROWS, 3)
    whole = mean_velocity(FIELDS[field], x, t, r, **HOW[how])
    alone = [mean_velocity(FIELDS[field], x[i : i + 1], t[i : i + 1], r[i : i + 1], **HOW[how]) for i in range(ROWS)]
    assert torch.equal(_first(whole), torch.cat([_first(row) for row in alone]))
    if isinstance(whole, tuple):
        for part in ("evaluations", "steps", "status"):
            assert torch.equal(getattr(whole[1], part), torch.cat([getattr(row[1], part) for row in alone]))


@pytest.mark.parametrize("how", ["euler", "rk4", "bosh3-adaptive"])
def test_rows_of_networks_agree_within_rounding(how: str, digits_teacher: VelocityNetwork) -> None:
    rows = 12
    x, t, r = _batch(rows, 1, 8, 8)
    label = torch.arange(rows) % 10
    whole = mean_velocity(digits_teacher, x, t, r, condition={"label": label}, **HOW[how])
    alone = [
        mean_velocity(digits_teacher, x[i : i + 1], t[i], r[i], condition={"label": label[i : i + 1]}, **HOW[how])
        for i in range(rows)
    ]
    error = (whole - torch.cat(alone)).norm() / whole.norm()
    assert float(error) < 1e-5


@pytest.mark.parametrize("how", ["euler", "bosh3-adaptive"])
def test_conditions_travel_with_their_rows(how: str) -> None:
    x, t, r = _batch(ROWS, 3)
    generator = torch.Generator().manual_seed(2)
    pushes = torch.randn(10, 3, generator=generator)
    label = torch.randint(10, (ROWS,), generator=generator)
    condition = {
        "label": label,
        "nested": {
            "row": torch.arange(ROWS, dtype=torch.float32),
            "deeper": {"shared": torch.tensor([[2.0, 3.0, 4.0]])},
        },
        "scale": 0.5,
        "nothing": None,
    }

    def field(x: Tensor, t: Tensor, *, label: Tensor, nested: Any, scale: float, nothing: None) -> Tensor:
        shared = nested["deeper"]["shared"]
        assert shared.shape == x.shape
        assert nothing is None
        return pushes[label] + nested["row"][:, None] * shared * scale

    expected = pushes[label] + torch.arange(ROWS)[:, None] * torch.tensor([1.0, 1.5, 2.0])
    found = mean_velocity(field, x, t, r, condition=condition, **HOW[how])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_rows_does_not_matter() -> None:
    x, t, r = _batch(ROWS, 3)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    for how in ("euler", "bosh3-adaptive"):
        field = FIELDS["mixture"]
        u = mean_velocity(field, x, t, r, **HOW[how])
        assert torch.equal(mean_velocity(field, x[order], t[order], r[order], **HOW[how]), u[order])


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 4, 4), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("how", ["euler", "ab2", "rk4", "bosh3-adaptive"])
def test_samples_of_any_shape(how: str, shape: tuple[int, ...]) -> None:
    x, t, r = _batch(7, *shape, dtype=torch.float64)

    def decay(x: Tensor, t: Tensor) -> Tensor:
        return x

    end = integrate(decay, x, t, r, **HOW[how] | {"return_stats": False})
    growth = torch.exp(r - t).reshape(7, *(1 for _ in shape))
    assert end.shape == x.shape
    torch.testing.assert_close(end, x * growth, rtol=0.1 if how == "euler" else 1e-2, atol=0)


@pytest.mark.parametrize("how", ["euler", "rk4", "bosh3-adaptive"])
def test_an_empty_batch(how: str) -> None:
    x, none = torch.empty(0, 3), torch.empty(0)
    condition = {"label": torch.empty(0, dtype=torch.int64), "shared": torch.ones(1, 2)}

    def field(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        raise AssertionError("there is nothing to compute")

    u, stats = mean_velocity(field, x, none, none, condition=condition, **HOW[how] | {"return_stats": True})
    assert u.shape == (0, 3)
    assert u.dtype == torch.float32
    assert stats.evaluations.shape == stats.steps.shape == stats.status.shape == (0,)
    assert integrate(field, x.double(), 1.0, 0.0, condition=condition, **HOW[how]).dtype == torch.float64
