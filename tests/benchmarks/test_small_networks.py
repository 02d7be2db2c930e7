"""Sequential MLPs at small batches: every runner and diffrax give the same numbers before they are timed."""

import pytest

from small_networks import make_problem, sequential_mlps


def test_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffrax", reason="diffrax and jax are extras")
    monkeypatch.setattr("small_networks.ROWS", (2,))
    (line,) = sequential_mlps(calls=10)
    own = {name.split()[1] for name in line["microseconds"] if name.startswith("mfd_fast")}
    assert {"eager", "compiled", "fused"} <= own
    best = {
        who: min(taken for name, taken in line["microseconds"].items() if name.startswith(who))
        for who in ("mfd_fast", "diffrax")
    }
    assert line["ratio"] == pytest.approx(best["diffrax"] / best["mfd_fast"])
    assert (line["rows"], line["calls"]) == (2, 10)


def test_the_field_takes_state_and_time() -> None:
    field, x, t, r = make_problem(5, 8, 2)
    assert field(x, t).shape == x.shape == (5, 2)
    assert bool((r < t).all())
