"""Rollouts of which only some rows are computed at once: the same results from as many calls as planned."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast import integrate, mean_velocity, mean_velocity_pair
from mfd_fast.closed_forms import GaussianMixture
from mfd_fast.models import build_model
from mfd_fast.models.lora import LoRARoles
from mfd_fast.rollout.plan import make_schedule
from mfd_fast.solvers import SOLVERS

FIELD = GaussianMixture([1.0, 2.0], [[-1.0, 0.5, 0.0], [1.0, -0.5, 2.0]], [0.3, 0.8])
ROWS = 23


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 3, generator=generator, dtype=dtype)
    t, r = torch.rand(2, ROWS, generator=generator, dtype=dtype)
    r[::9] = t[::9]
    return x, t, r


class Counted:
    """A field that notes how many rows each call had, and which."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, *, row: Tensor, push: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        self.seen.append(row.clone())
        velocity = FIELD(x, t)
        return velocity if push is None else velocity + push


def how(solver: str) -> dict[str, Any]:
    return {"solver": solver, "steps": 5} if solver == "bosh3" else {"solver": solver, "step_size": 0.07}


@pytest.mark.parametrize("max_rows", [1, 2, 5, 22, 23, 99])
@pytest.mark.parametrize("solver", SOLVERS)
def test_fixed_steps_equal_the_whole_batch(solver: str, max_rows: int) -> None:
    x, t, r = batch()
    options = {"condition": {"row": torch.arange(ROWS)}, "return_stats": True, **how(solver)}
    whole, expected = mean_velocity(Counted(), x, t, r, **options)
    field = Counted()
    limited, stats = mean_velocity(field, x, t, r, max_rows=max_rows, **options)
    torch.testing.assert_close(limited, whole, rtol=1e-12, atol=1e-12)
    for name in ("evaluations", "steps", "status"):
        assert torch.equal(getattr(stats, name), getattr(expected, name))
    # As many calls as planned, each of as many rows as are at work, and no row more often than it needs.
    assert field.rows == make_schedule(expected.evaluations, min(max_rows, ROWS)).live
    assert torch.equal(torch.bincount(torch.cat(field.seen), minlength=ROWS), expected.evaluations)
    end = integrate(Counted(), x, t, r, max_rows=max_rows, condition=options["condition"], **how(solver))
    torch.testing.assert_close(end, x + (r - t)[:, None] * whole, rtol=1e-10, atol=1e-10)


def test_compiled_copies_are_limited_too() -> None:
    network = build_model("mlp", (3,), 3, width=16, depth=1)
    x, t, r = batch(torch.float32)
    options = {
        "condition": {"label": torch.arange(ROWS) % 3},
        "negative_condition": {"label": torch.tensor([3])},
        "guidance_scale": 2.0,
        "step_size": 0.1,
    }
    whole = mean_velocity(network, x, t, r, runner="eager", **options)
    limited = mean_velocity(network, x, t, r, runner="compiled", max_rows=8, **options)
    torch.testing.assert_close(limited, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "ab2", "rk4"])
def test_float32_and_budgets(solver: str) -> None:
    x, t, r = batch(torch.float32)
    for options in ({"step_size": 0.05}, {"step_size": 0.05, "max_evaluations": 5}):
        whole, expected = mean_velocity(FIELD, x, t, r, solver=solver, return_stats=True, **options)
        limited, stats = mean_velocity(FIELD, x, t, r, solver=solver, return_stats=True, max_rows=4, **options)
        torch.testing.assert_close(limited, whole, rtol=2e-6, atol=2e-6)
        assert torch.equal(stats.status, expected.status)


def test_guidance_counts_twice_and_conditions_follow_their_rows() -> None:
    x, t, r = batch()
    generator = torch.Generator().manual_seed(3)
    options = {
        "condition": {
            "row": torch.arange(ROWS),
            "push": torch.randn(ROWS, 3, generator=generator, dtype=torch.float64),
        },
        "negative_condition": {"push": torch.randn(1, 3, generator=generator, dtype=torch.float64)},
        "guidance_scale": torch.linspace(0, 3, ROWS, dtype=torch.float64),
        "step_size": 0.1,
        "solver": "ab2",
        "return_stats": True,
    }
    whole, expected = mean_velocity(Counted(), x, t, r, **options)
    field = Counted()
    limited, stats = mean_velocity(field, x, t, r, max_rows=9, **options)
    torch.testing.assert_close(limited, whole, rtol=1e-12, atol=1e-12)
    assert max(field.rows) == 8
    assert torch.equal(stats.evaluations, expected.evaluations)


@pytest.mark.parametrize("max_rows", [3, 6, 8])
def test_pairs_count_all_their_rows(max_rows: int) -> None:
    roles = LoRARoles(build_model("mlp", (3,), 3, width=8, depth=1), rank=2, alpha=2.0)
    rows: list[int] = []
    roles.network.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    x, t, r = batch(torch.float32)
    options = {
        "condition": {"label": torch.arange(ROWS) % 3},
        "negative_condition": {"label": torch.tensor([3])},
        "guidance_scale": 2.0,
        "step_size": 0.1,
        "return_stats": True,
    }
    whole = mean_velocity_pair(roles.teacher, roles.auxiliary, x, t, r, **options)
    rows.clear()
    limited = mean_velocity_pair(roles.teacher, roles.auxiliary, x, t, r, max_rows=max_rows, **options)
    assert max(rows) == max_rows // 3 * 3
    for i in range(2):
        torch.testing.assert_close(limited[i], whole[i], rtol=1e-5, atol=1e-5)
        assert torch.equal(limited[2][i].evaluations, whole[2][i].evaluations)
    assert int(whole[2].teacher.evaluations.sum()) == 2 * int(whole[2].auxiliary.evaluations.sum())
    with pytest.raises(ValueError, match=r"max_rows must be at least 3, .* got 2"):
        mean_velocity_pair(roles.teacher, roles.auxiliary, x, t, r, max_rows=2, **options)


def test_adaptive_solvers_run_in_parts() -> None:
    x, t, r = batch()
    options = {"condition": {"row": torch.arange(ROWS)}, "solver": "bosh3", "rtol": 1e-5, "return_stats": True}
    whole, expected = mean_velocity(Counted(), x, t, r, **options)
    field = Counted()
    limited, stats = mean_velocity(field, x, t, r, max_rows=6, **options)
    assert torch.equal(limited, whole)
    assert all(
        torch.equal(getattr(stats, name), getattr(expected, name)) for name in ("evaluations", "steps", "status")
    )
    assert max(field.rows) == 6


def test_gradients_are_those_of_the_whole_batch() -> None:
    x, t, r = batch()

    def gradient(max_rows: int | None) -> Tensor:
        leaf = x.clone().requires_grad_()
        u = mean_velocity(FIELD, leaf, t, r, solver="ab2", step_size=0.1, differentiable=True, max_rows=max_rows)
        (found,) = torch.autograd.grad(u.square().sum(), leaf)
        return found

    torch.testing.assert_close(gradient(5), gradient(None), rtol=1e-12, atol=1e-12)


def test_a_bad_velocity_names_its_row() -> None:
    x, t, r = batch()
    t[:], r[:] = 0.9, 0.1

    def field(x: Tensor, t: Tensor, *, row: Tensor) -> Tensor:
        return torch.where((row[:, None] == 17) & (t[:, None] < 0.5), torch.nan, -x)

    with pytest.raises(FloatingPointError, match=r"row 17 at time 0\.4"):
        mean_velocity(field, x, t, r, steps=8, max_rows=4, condition={"row": torch.arange(ROWS)})
    _, stats = mean_velocity(
        field, x, t, r, steps=8, max_rows=4, condition={"row": torch.arange(ROWS)}, return_stats=True
    )
    assert stats.status.nonzero().flatten().tolist() == [17]


def test_long_rollouts_send_their_numbers_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from mfd_fast.rollout import slots

    x, t, r = batch()
    whole = mean_velocity(FIELD, x, t, r, solver="ab2", step_size=0.01)
    monkeypatch.setattr(slots, "TABLE_NUMBERS", 7 * 5 * 11)
    limited = mean_velocity(FIELD, x, t, r, solver="ab2", step_size=0.01, max_rows=5)
    torch.testing.assert_close(limited, whole, rtol=1e-12, atol=1e-12)
