"""Recorded rollouts give what eager ones give, whatever happens to weights, batches and conditions in between.

There is no CUDA device here: the recorder of this folder takes the place of CUDA graphs; test_captured_gpu.py uses the
real ones.
"""

import gc
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfd_fast
from mfd_fast import fields
from mfd_fast.intervals import Uniform, sample_pairs
from mfd_fast.models import build_model
from mfd_fast.models.lora import LoRARoles
from mfd_fast.ops import linear
from mfd_fast.rollout import captured, graphs
from mfd_fast.rollout.compiled import Measured, remember
from mfd_fast.solvers import SOLVERS
from mfd_fast.training.ema import WeightAverage


class Network(nn.Module):
    """Like any small network: weights, a buffer, a class label, a shared and a nested condition, dropout."""

    forwards = 0

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.enter, self.leave = nn.Linear(7, 16), nn.Linear(16, 6)
            self.label = nn.Embedding(4, 16)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("shift", torch.full((16,), 0.1))
        self.to(dtype)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, extra: Any = None) -> Tensor:
        Network.forwards += 1
        self.counted = getattr(self, "counted", 0) + 1  # which is no reason to record it again
        hidden = torch.tanh(self.enter(torch.cat([x, t[:, None].to(x.dtype)], 1)) + self.label(label) + self.shift)
        if extra is not None:
            hidden = hidden + extra["shared"] * extra["row"][:, None] * extra["factor"]
        return self.leave(self.dropout(hidden))


@pytest.fixture
def network() -> Network:
    return Network().eval()


def problem(rows: int = 9, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator).to(dtype)
    t, r = sample_pairs(Uniform(), rows, generator=generator)
    r[0] = t[0]
    return x, t, r, {"label": torch.randint(0, 3, (rows,), generator=generator)}


def both(field: Callable[..., Tensor], *, rows: int = 9, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    x, t, r, condition = problem(rows, seed)
    options = {"condition": condition, "step_size": 0.1, "return_stats": True} | options
    eager, found = (
        mfd_fast.mean_velocity(field, x, t, r, runner=runner, **options) for runner in ("eager", "captured")
    )
    return eager, found


def assert_equal(field: Callable[..., Tensor], **options: Any) -> Tensor:
    (eager, expected), (found, stats) = both(field, **options)
    assert (stats.runner, stats.reason) == ("captured", "asked for")
    for name in ("evaluations", "steps", "status"):
        assert torch.equal(getattr(stats, name), getattr(expected, name)), name
    precision = 1e-12 if found.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found, eager, rtol=precision, atol=precision)
    return found


GUIDED = {"negative_condition": {"label": torch.tensor([3])}, "guidance_scale": 4.5}


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


def data_copy(network: Network) -> None:
    for parameter in network.parameters():
        parameter.data.copy_(0.5 * parameter.data)


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
    change(network)
    after = assert_equal(network)
    if change is not average_swapped:  # which puts back what it found
        assert float((after - before).abs().max()) > 1e-3
    # What changes in place needs no new recording; what lies elsewhere, or works otherwise, does.
    assert len(recorder.made) == (1 if change in IN_PLACE else 2)


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


class Plain:
    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return -x


REFUSED: dict[str, tuple[Callable[[Network], Any], dict[str, Any], str]] = {
    "function": (lambda _: lambda x, t, label: x, {}, "the field is a function, not an nn.Module"),
    "object": (lambda _: Plain(), {}, "the field is a Plain, not an nn.Module"),
    "wrapped-function": (lambda _: fields.reversed_time(Plain()), {}, "the field is a Plain"),
    "adaptive": (lambda network: network, {"solver": "bosh3"}, "only fixed steps"),
    "library": (lambda network: network, {"solver": "torchdiffeq:rk4"}, "only fixed steps"),
    "gradient": (lambda network: network, {"differentiable": True}, "no gradient"),
    "condition": (
        lambda network: network,
        {"condition": {"label": torch.zeros(9, dtype=torch.int64), "extra": {"what": [1]}}},
        "what is a list, of which it cannot be seen",
    ),
    "partial-guidance": (
        lambda network: network,
        {"negative_condition": {"label": torch.tensor([3])}, "guidance_scale": 2.0, "guidance_interval": (0.2, 0.8)},
        "memory is a NegativeVelocities, of which it cannot be seen",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_recorded_says_why(recorder: Any, network: Network, case: str) -> None:
    make, options, message = REFUSED[case]
    x, t, r, condition = problem()
    with pytest.raises(ValueError, match=f"runner='captured' is not possible: .*{message}"):
        mfd_fast.mean_velocity(make(network), x, t, r, runner="captured", **{"condition": condition} | options)
    assert recorder.made == []


@pytest.mark.usefixtures("recorder")
def test_ambient_autocast_is_refused_and_the_wrapper_is_not(network: Network) -> None:
    x, t, r, condition = problem()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"torch\.autocast is on around the call"),
    ):
        mfd_fast.mean_velocity(network, x, t, r, condition=condition, runner="captured")
    assert_equal(fields.scaled_time(network, 0.5))


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
def test_without_a_device_it_is_refused(network: Network) -> None:
    x, t, r, condition = problem()
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, this one is cpu"):
        mfd_fast.mean_velocity(network, x, t, r, condition=condition, runner="captured")


@pytest.mark.usefixtures("recorder")
def test_auto_takes_what_is_left(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t, r, condition = problem()

    def auto(field: Any = network, **options: Any) -> tuple[str, str]:
        stats = mfd_fast.mean_velocity(field, x, t, r, condition=condition, return_stats=True, **options)[1]
        return stats.runner, stats.reason

    remember(network, Measured(("captured",), "recorded evaluations are 3.00 times as fast"))
    assert auto() == ("captured", "auto: recorded evaluations are 3.00 times as fast")
    assert auto(solver="bosh3")[0] == "eager"
    assert auto(solver="bosh3")[1].startswith("auto: only fixed steps")
    assert auto(differentiable=True)[1] == "auto: recordings have no gradient"
    assert auto(runner="eager") == ("eager", "asked for")
    remember(network, None)
    assert auto()[0] == "eager"


def test_a_recording_that_fails_is_a_reason(recorder: Any, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(recorder):
        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    monkeypatch.setitem(graphs.RECORDERS, "cpu", Failing)
    x, t, r, condition = problem()
    with pytest.raises(ValueError, match=r"recording it failed: operation not permitted when stream is capturing$"):
        mfd_fast.mean_velocity(network, x, t, r, condition=condition, runner="captured")
    remember(network, Measured(("captured",), "faster"))
    _, stats = mfd_fast.mean_velocity(network, x, t, r, condition=condition, return_stats=True)
    assert stats.runner == "eager"
    assert stats.reason.startswith("auto: recording it failed")
    assert len(captured._RECORDINGS) == 0


def test_uses_the_compiled_copy(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Repeating(recorder):
        """Compiled code cannot be written down; it is run again."""

        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            work()
            return work

    monkeypatch.setitem(graphs.RECORDERS, "cpu", Repeating)
    seen = []
    real = captured.compiled_field
    monkeypatch.setattr(captured, "compiled_field", lambda field: seen.append(field) or real(field))
    network = build_model("mlp", (6,), 3, width=16, depth=1)
    for seed in range(2):
        (eager, _), (found, stats) = both(network, seed=seed, solver="ab2", **GUIDED)
        torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)
        assert stats.runner == "captured"
        data_copy(network)
    assert len(seen) == 2
    captured.forget_all()


def test_a_network_that_compiles_not_is_recorded_as_it_is(
    recorder: Any, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(captured, "compiled_field", lambda field: Broken())
    before = assert_equal(network)
    data_copy(network)
    assert float((assert_equal(network) - before).abs().max()) > 1e-3
    assert len([made for made in recorder.made if made.recorded]) == 1


def test_warmup_measures_and_chooses(network: Network, recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device can record, the warm-up times it; a field that compiles no more may still be recorded."""
    linear.why_not_onednn()  # which has a use for the clock
    warmup = sys.modules["mfd_fast.warmup"]
    real, now, slow = mfd_fast.mean_velocity, [0.0], {"eager": 4.0, "captured": 1.0, "compiled": 2.0}

    def timed(*arguments: Any, runner: str, **options: Any) -> Any:
        now[0] += slow[runner]
        return real(*arguments, runner="eager" if runner == "compiled" else runner, **options)

    monkeypatch.setattr(warmup, "mean_velocity", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    x, t, r, condition = problem()
    report = mfd_fast.warmup(network, x, condition=condition)
    assert report.runner == "captured"
    assert report.seconds == slow
    assert report.reason == "recorded evaluations are 4.00 times as fast on 9 rows"
    _, stats = real(network, x, t, r, condition=condition, return_stats=True)
    assert stats.runner == "captured"
    monkeypatch.setattr(warmup, "compiled_field", captured.compiled_field)
    assert set(mfd_fast.warmup(network, x, condition=condition).seconds) == {"eager", "captured"}
    remember(network, None)
