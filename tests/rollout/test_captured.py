"""Recorded rollouts give what eager ones give, whatever happens to weights, batches and conditions in between.

There is no CUDA device here: the recorder of this folder takes the place of CUDA graphs; test_captured_gpu.py uses the
real ones.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny_switched
import torch
from tiny_recorded import GUIDED, Network, assert_equal, data_copy, problem
from torch import Tensor, nn

import mfd_fast
from mfd_fast.models import build_model
from mfd_fast.models.lora import LoRARoles
from mfd_fast.rollout import captured, graphs
from mfd_fast.solvers import SOLVERS
from mfd_fast.training.ema import WeightAverage


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_equals_eager(recorder: Any, network: Network, solver: str, guided: bool) -> None:
    how: dict[str, Any] = {"steps": 4, "step_size": None} if solver == "bosh3" else {}
    assert_equal(network, solver=solver, **how, **(GUIDED if guided else {}))
    assert_equal(network, solver=solver, seed=1, **how, **(GUIDED if guided else {}))
    assert len(recorder.made) == 1


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13, 17, 30])
def test_any_number_of_rows(network: Network, rows: int) -> None:
    assert_equal(network, rows=rows, solver="ab2", **GUIDED)
    assert_equal(
        network,
        rows=rows,
        seed=1,
        guidance_scale=torch.linspace(0, 3, rows),
        negative_condition=GUIDED["negative_condition"],
    )


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize("solver", ["euler", "ab2", "rk4"])
@pytest.mark.parametrize("max_rows", [2, 5, 6])
def test_limited_rows(network: Network, solver: str, max_rows: int) -> None:
    assert_equal(network, rows=11, solver=solver, max_rows=max_rows, **GUIDED)
    (recording,) = captured._RECORDINGS.values()
    assert recording.slots.count == max_rows // 2
    assert max(recording.replays) == max_rows // 2


@pytest.mark.usefixtures("recorder")
def test_both_directions_equal_times_and_budgets(network: Network) -> None:
    x, t, r, condition = problem(12)
    r[3:6], t[3:6] = t[3:6].clone(), r[3:6].clone()
    for options in ({}, {"max_evaluations": 3}, {"steps": 3}):
        how = {
            "condition": condition,
            "return_stats": True,
            "step_size": None if "steps" in options else 0.1,
            **options,
        }
        (eager, a), (found, b) = (
            mfd_fast.mean_velocity(network, x, t, r, runner=runner, **how) for runner in ("eager", "captured")
        )
        torch.testing.assert_close(found, eager, rtol=2e-6, atol=2e-6)
        assert torch.equal(a.status, b.status)
    instant = mfd_fast.mean_velocity(network, x, t, t, condition=condition, runner="captured")
    torch.testing.assert_close(instant, network(x, t, **condition), rtol=1e-6, atol=1e-6)
    end = mfd_fast.integrate(network, x, t, t, condition=condition, runner="captured")
    assert torch.equal(end, x)


@pytest.mark.usefixtures("recorder")
def test_float64_and_low_precision_networks() -> None:
    x, t, r, condition = problem(5, dtype=torch.float64)
    how = {"condition": condition, "step_size": 0.1}
    wide = Network(torch.float64).eval()
    eager, found = (mfd_fast.mean_velocity(wide, x, t, r, runner=name, **how) for name in ("eager", "captured"))
    torch.testing.assert_close(found, eager, rtol=1e-12, atol=1e-12)
    assert found.dtype == torch.float64
    low = Network(torch.bfloat16).eval()
    eager, found = (
        mfd_fast.mean_velocity(low, x.float(), t, r, runner=name, field_dtype=torch.bfloat16, **how)
        for name in ("eager", "captured")
    )
    torch.testing.assert_close(found, eager, rtol=1e-2, atol=1e-2)
    assert found.dtype == torch.float32


@pytest.mark.usefixtures("recorder")
def test_conditions_of_every_kind(network: Network) -> None:
    x, t, r, condition = problem(7)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        extra = {
            "shared": torch.randn(1, 16, generator=generator),
            "row": torch.randn(7, generator=generator),
            "factor": 0.5,
        }
        how = {"condition": {**condition, "extra": extra}, "step_size": 0.1}
        eager, found = (mfd_fast.mean_velocity(network, x, t, r, runner=name, **how) for name in ("eager", "captured"))
        torch.testing.assert_close(found, eager, rtol=2e-6, atol=2e-6)
    assert len(captured._RECORDINGS) == 1
    extra["factor"] = 2.0  # a number is part of what is recorded
    eager, found = (mfd_fast.mean_velocity(network, x, t, r, runner=name, **how) for name in ("eager", "captured"))
    torch.testing.assert_close(found, eager, rtol=2e-6, atol=2e-6)
    assert len(captured._RECORDINGS) == 2


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_pairs_on_one_backbone(guided: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        roles = LoRARoles(build_model("mlp", (6,), 3, width=16, depth=1), rank=2, alpha=2.0)
    for parameter in roles.parameters("auxiliary"):
        parameter.data += 0.1
    for seed in range(2):
        x, t, r, condition = problem(7, seed)
        how = {"condition": condition, "step_size": 0.1, "return_stats": True, **(GUIDED if guided else {})}
        eager, found, limited = (
            mfd_fast.mean_velocity_pair(roles.teacher, roles.auxiliary, x, t, r, runner=name, max_rows=most, **how)
            for name, most in (("eager", None), ("captured", None), ("captured", 7))
        )
        for other in (found, limited):
            for i in range(2):
                torch.testing.assert_close(other[i], eager[i], rtol=5e-6, atol=5e-6)
                assert torch.equal(other[2][i].evaluations, eager[2][i].evaluations)
        assert found[2].teacher.runner == "captured"
        roles.parameters("auxiliary")[0].data.mul_(2.0)
    assert len(captured._RECORDINGS) == 1


@pytest.mark.usefixtures("recorder")
def test_roles_of_one_backbone_are_recorded_apart() -> None:
    roles = LoRARoles(build_model("mlp", (6,), 3, width=16, depth=1), rank=2, alpha=2.0)
    for parameter in roles.parameters("auxiliary"):
        parameter.data += 0.1
    teacher, auxiliary, again = (assert_equal(role) for role in (roles.teacher, roles.auxiliary, roles.teacher))
    assert torch.equal(teacher, again)
    assert float((teacher - auxiliary).abs().max()) > 1e-4
    assert len(captured._RECORDINGS) == 2


def fused_adamw(network: Network) -> None:
    step(network, torch.optim.AdamW(network.parameters(), lr=0.1, fused=True))


def foreach_sgd(network: Network) -> None:
    step(network, torch.optim.SGD(network.parameters(), lr=0.1, foreach=True))


def step(network: Network, optimizer: torch.optim.Optimizer) -> None:
    x, t, _, condition = problem()
    network(x, t, **condition).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def load_state_dict(network: Network) -> None:
    network.load_state_dict({name: 0.5 * value for name, value in network.state_dict().items()})


def average_swapped(network: Network) -> None:
    average = WeightAverage(list(network.parameters()), 0.5)
    data_copy(network)
    average.applied().__enter__()


def data_replaced(network: Network) -> None:
    for parameter in network.parameters():
        parameter.data = 0.5 * parameter.data


def parameter_replaced(network: Network) -> None:
    network.leave.weight = nn.Parameter(0.5 * network.leave.weight.data)


def buffer_replaced(network: Network) -> None:
    network.shift = torch.full((16,), 3.0)


def hooked(network: Network) -> None:
    network.leave.register_forward_hook(lambda module, arguments, output: 2 * output)


def training(network: Network) -> None:
    network.dropout.p = 1.0  # nothing random about it
    network.train()


IN_PLACE = [fused_adamw, foreach_sgd, load_state_dict, data_copy, average_swapped]


ANEW = [data_replaced, parameter_replaced, buffer_replaced, hooked, training]


@pytest.mark.parametrize("change", IN_PLACE + ANEW, ids=lambda change: change.__name__)
def test_weights_are_never_stale(recorder: Any, network: Network, change: Callable[[Network], None]) -> None:
    before = assert_equal(network)
    recordings = _recordings(recorder)
    change(network)
    after = assert_equal(network)
    if change is not average_swapped:  # which puts back what it found
        assert float((after - before).abs().max()) > 1e-3
    # What changes in place needs no new recording; what lies elsewhere, or works otherwise, does.
    assert _recordings(recorder) == (recordings if change in IN_PLACE else 2 * recordings)


def _recordings(recorder: Any) -> int:
    return sum(len(each.recorded) for each in recorder.made)


def _run(network: nn.Module, runner: str) -> Tensor:
    x, t, r, _ = problem()
    return mfd_fast.mean_velocity(network, x, t, r, step_size=0.1, runner=runner)


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize("change", tiny_switched.CHANGES, ids=lambda change: change.__name__)
def test_what_is_no_weight_is_never_stale(change: Callable[[nn.Module], None]) -> None:
    network = tiny_switched.switched(change)
    before = _run(network, "captured")
    change(network)
    after = _run(network, "captured")
    torch.testing.assert_close(after, _run(network, "eager"), rtol=2e-6, atol=2e-6)
    assert float((after - before).abs().max()) > 1e-3


def test_going_back_and_forth_between_adapters_records_each_once(recorder: Any) -> None:
    network = tiny_switched.Switched()
    recordings = []
    for _ in range(2):
        for adapters in (["first"], ["second"], []):
            network.active = adapters
            torch.testing.assert_close(_run(network, "captured"), _run(network, "eager"), rtol=2e-6, atol=2e-6)
        recordings.append(_recordings(recorder))
    assert recordings[0] == recordings[1] > 3
    (recording,) = captured._RECORDINGS.values()
    for factor in range(2 * captured.MAX_STATES):
        network.factor = float(factor)
        _run(network, "captured")
    assert len(recording._states) == captured.MAX_STATES


def test_few_recordings_over_random_batches(recorder: Any, network: Network) -> None:
    for seed in (*range(12), *range(12)):
        rows = int(torch.randint(2, 30, (), generator=torch.Generator().manual_seed(seed)))
        assert_equal(network, rows=rows, seed=seed)
        if seed == 11:
            made = [len(each.recorded) for each in recorder.made]
    (recording,) = captured._RECORDINGS.values()
    assert set(recording.replays) <= {1, 2, 4, 8, 16, 24, 32}
    assert made == [len(each.recorded) for each in recorder.made], "the same batches again need nothing new"
    assert max(made) <= 7
    assert len(made) <= 4, "a batch larger than any before it is a new beginning"


def test_one_replay_for_each_evaluation_and_nothing_else_of_the_network(recorder: Any, network: Network) -> None:
    assert_equal(network)  # which records
    replays, forwards = recorder.made[0].replays, Network.forwards
    x, t, r, condition = problem()
    _, stats = mfd_fast.mean_velocity(
        network, x, t, r, condition=condition, step_size=0.1, runner="captured", return_stats=True
    )
    assert recorder.made[0].replays - replays == int(stats.evaluations.max())
    assert Network.forwards == forwards


@pytest.mark.usefixtures("recorder")
def test_padding_and_leftovers_do_not_reach_other_rows(network: Network) -> None:
    """Slots without a row compute what they please: a rollout that broke down leaves nothing behind for the next."""
    x, t, r, condition = problem(9)
    how = {"condition": condition, "step_size": 0.1, "runner": "captured"}
    expected = mfd_fast.mean_velocity(network, x, t, r, **how)
    weight = network.leave.weight.data.clone()
    network.leave.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        mfd_fast.mean_velocity(network, x, t, r, **how)
    network.leave.weight.data.copy_(weight)
    assert torch.equal(mfd_fast.mean_velocity(network, x, t, r, **how), expected)
    fewer = mfd_fast.mean_velocity(
        network, x[:3], t[:3], r[:3], **how | {"condition": {"label": condition["label"][:3]}}
    )
    torch.testing.assert_close(fewer, expected[:3], rtol=1e-5, atol=1e-6)


def test_slots_without_a_row_compute_at_valid_times(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict(nn.Module):
        time_range = (0.2, 0.9)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert bool(((t >= 0.2) & (t <= 0.9)).all())
            assert bool((x.abs().sum(1) > 0).all())
            return -0.5 * x

    class Watching(recorder):
        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            work()
            return work

    monkeypatch.setitem(graphs.RECORDERS, "cpu", Watching)
    x, t, r, _ = problem(5)
    t, r = t.clamp(0.25, 0.85), r.clamp(0.25, 0.85)
    field = Strict()
    eager, found = (
        mfd_fast.mean_velocity(field, x, t, r, runner=name, step_size=0.1) for name in ("eager", "captured")
    )
    torch.testing.assert_close(found, eager, rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("recorder")
def test_recordings_are_few_and_die_with_their_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "MAX_RECORDINGS", 2)
    networks = [Network().eval() for _ in range(3)]
    for network in networks:
        assert_equal(network)
    keys = list(captured._RECORDINGS)
    assert len(keys) == 2
    assert id(networks[0]) not in {key[0][1] for key in keys}
    assert_equal(networks[1])  # the one used last stays longest
    assert_equal(networks[0])
    assert [key[0][1] for key in captured._RECORDINGS] == [id(networks[1]), id(networks[0])]
    gone = weakref.ref(networks[2])
    del networks[2], network
    gc.collect()
    assert gone() is None
    assert len(captured._RECORDINGS) == 2


def test_a_network_that_is_gone_takes_its_recording_along(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(recorder):
        """Keeps no reference to the work, as a graph on a device."""

        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            work()
            return lambda: None

    monkeypatch.setitem(graphs.RECORDERS, "cpu", Forgetful)
    network = Network().eval()
    x, t, r, condition = problem()
    mfd_fast.mean_velocity(network, x, t, r, condition=condition, runner="captured")
    assert len(captured._RECORDINGS) == 1
    del network
    gc.collect()
    assert len(captured._RECORDINGS) == 0
    assert len(captured._OWNERS) == 0
