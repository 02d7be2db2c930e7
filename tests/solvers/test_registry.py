"""Names of solvers."""

import pytest

from mfd_fast.solvers import SOLVERS, TorchdiffeqSolver, get_solver
from mfd_fast.solvers.torchdiffeq import ADAPTIVE_METHODS, FIXED_METHODS


def test_names() -> None:
    assert list(SOLVERS) == ["euler", "midpoint", "heun", "ab2", "rk4", "bosh3"]
    assert [name for name, solver in SOLVERS.items() if solver.error_order is not None] == ["bosh3"]


@pytest.mark.parametrize("name", SOLVERS)
def test_get(name: str) -> None:
    assert get_solver(name) is SOLVERS[name]


def test_methods_of_torchdiffeq() -> None:
    assert get_solver("torchdiffeq:rk4") == TorchdiffeqSolver("rk4")
    assert all(get_solver(f"torchdiffeq:{method}").error_order is None for method in FIXED_METHODS)
    assert all(get_solver(f"torchdiffeq:{method}").error_order is not None for method in ADAPTIVE_METHODS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eulr", r"solver must be one of euler, .*bosh3 or torchdiffeq:<method>, got 'eulr'; did you mean 'euler'\?"),
        ("dopri5", r"or torchdiffeq:<method>, got 'dopri5'$"),
        ("torchdiffeq:dopri", r"torchdiffeq:<method>' takes one of euler, .*dopri5.*, got 'dopri'"),
        ("", "solver must be one of"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_solver(name)


@pytest.mark.parametrize("name", [None, 4, ["euler"]], ids=["none", "int", "list"])
def test_what_is_not_a_name(name: object) -> None:
    with pytest.raises(TypeError, match="solver must be the name of a solver, got"):
        get_solver(name)  # type: ignore[arg-type]
