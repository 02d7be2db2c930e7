"""The compiled runner gives what the eager one gives, whatever happens to the weights in between."""

import copy
import gc
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable

import pytest
import tiny_switched
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

import mfd_fast
from mfd_fast import fields
from mfd_fast.intervals import Uniform, sample_pairs
from mfd_fast.models import build_model
from mfd_fast.ops import linear
from mfd_fast.training.ema import WeightAverage


def make_network(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model("mlp", (6,), 3, width=32, depth=2)
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network.to(dtype)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """One module for all tests that leave its weights alone: compiling is what takes the time."""
    return make_network()


def problem(rows: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    t, r = sample_pairs(Uniform(), rows, generator=generator)
    r[0] = t[0]
    return x, t, r, {"label": torch.randint(0, 3, (rows,), generator=generator)}


def both(field: Callable[..., Tensor], **options: object) -> tuple[Tensor, Tensor]:
    x, t, r, condition = problem()
    eager, compiled = (
        mfd_fast.mean_velocity(field, x, t, r, condition=condition, runner=runner, **options)
        for runner in ("eager", "compiled")
    )
    return eager, compiled


def assert_equal(field: Callable[..., Tensor], **options: object) -> None:
    eager, compiled = both(field, **options)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "ab2", "rk4", "bosh3"])
def test_equals_eager(network: nn.Module, solver: str) -> None:
    assert_equal(network, solver=solver, step_size=0.1)


def test_equals_eager_under_guidance_and_wrappers(network: nn.Module) -> None:
    negative = {"negative_condition": {"label": torch.tensor([3])}, "guidance_scale": 4.5}
    assert_equal(network, step_size=0.1, **negative)
    assert_equal(fields.reversed_time(network), step_size=0.1, **negative)


def test_statistics_name_the_runner(network: nn.Module) -> None:
    x, t, r, condition = problem()
    _, stats = mfd_fast.mean_velocity(network, x, t, r, condition=condition, runner="compiled", return_stats=True)
    assert (stats.runner, stats.reason) == ("compiled", "asked for")
    _, stats = mfd_fast.mean_velocity(network, x, t, r, condition=condition, return_stats=True)
    assert stats.runner == "eager"


def fused_adamw(network: nn.Module) -> None:
    step(network, torch.optim.AdamW(network.parameters(), lr=0.1, fused=True))


def foreach_sgd(network: nn.Module) -> None:
    step(network, torch.optim.SGD(network.parameters(), lr=0.1, foreach=True))


def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, t, _, condition = problem()
    network(x, t, **condition).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def load_state_dict(network: nn.Module) -> None:
    network.load_state_dict({name: 0.5 * value for name, value in network.state_dict().items()})


def data_copy(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.data.copy_(0.5 * parameter.data)


def data_replaced(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.data = 0.5 * parameter.data


def parameter_replaced(network: nn.Module) -> None:
    network.get_submodule("leave").weight = nn.Parameter(0.5 * network.get_parameter("leave.weight").data)


def average_swapped(network: nn.Module) -> None:
    average = WeightAverage(list(network.parameters()), 0.5)
    data_copy(network)
    average.applied().__enter__()


CHANGES = [fused_adamw, foreach_sgd, load_state_dict, data_copy, data_replaced, parameter_replaced, average_swapped]


@pytest.fixture(scope="module")
def changing() -> nn.Module:
    return make_network()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_are_never_stale(changing: nn.Module, change: Callable[[nn.Module], None]) -> None:
    before = both(changing, step_size=0.2)[1]
    change(changing)
    eager, compiled = both(changing, step_size=0.2)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    if change is not average_swapped:  # which puts back what it found
        assert float((compiled - before).abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_part_runs_as_it_is() -> None:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = torch.jit.script(nn.Sequential(nn.Linear(6, 6)))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            velocity: Tensor = self.part(x)
            return velocity

    field, (x, t, r, _) = Field(), problem()
    for _ in range(2):
        eager, compiled = (
            mfd_fast.mean_velocity(field, x, t, r, step_size=0.2, runner=runner) for runner in ("eager", "compiled")
        )
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            field.part[0].weight.mul_(2)


@pytest.mark.parametrize("change", tiny_switched.CHANGES, ids=lambda change: change.__name__)
def test_what_is_no_weight_is_never_stale(change: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler: it guards what it reads of the copy, and takes seconds for each change."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    network, (x, t, r, _) = tiny_switched.switched(change), problem()

    def run(runner: str) -> Tensor:
        return mfd_fast.mean_velocity(network, x, t, r, step_size=0.2, runner=runner)

    before = run("compiled")
    change(network)
    after = run("compiled")
    torch.testing.assert_close(after, run("eager"), rtol=1e-5, atol=1e-5)
    assert float((after - before).abs().max()) > 1e-3


def test_going_back_and_forth_between_adapters_compiles_each_once() -> None:
    network, (x, t, r, _) = tiny_switched.Switched(), problem()
    graphs = []
    for _ in range(2):
        for adapters in (["first"], ["second"], []):
            network.active = adapters
            eager, compiled = (
                mfd_fast.mean_velocity(network, x, t, r, step_size=0.2, runner=runner)
                for runner in ("eager", "compiled")
            )
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


def test_follows_buffers_and_training_mode() -> None:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.ones(6))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x + self.shift * (2.0 if self.training else 1.0)

    field, x = Field(), torch.zeros(3, 6)

    def velocity() -> float:
        return float(mfd_fast.mean_velocity(field, x, 0.5, 0.5, runner="compiled")[0, 0])

    assert velocity() == 2.0
    field.eval()
    assert velocity() == 1.0
    field.shift = torch.full((6,), 3.0)
    assert velocity() == 3.0


def test_the_module_is_left_alone_and_not_kept_alive() -> None:
    network = make_network()
    parameter = network.get_parameter("enter.weight")
    both(network)
    assert parameter.requires_grad
    assert parameter.grad is None
    assert type(network.get_submodule("enter")) is nn.Linear
    gone = weakref.ref(network)
    del network, parameter
    gc.collect()
    assert gone() is None


class Convolutions(nn.Module):
    """A small network for pictures that is given its time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + t.view(-1, 1, 1, 1)))


@pytest.mark.parametrize("name", ["convolutions", "attention"])
def test_few_graphs_over_random_batches(name: str) -> None:
    network = Convolutions()
    if name == "attention":
        network = build_model("dit", (1, 8, 8), width=16, heads=2, depth=1)
    counters.clear()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        rows = int(torch.randint(1, 12, (), generator=generator))
        t, r = sample_pairs(Uniform(), rows, generator=generator)
        x = torch.randn(rows, 1, 8, 8, generator=generator)
        mfd_fast.mean_velocity(network, x, t, r, step_size=0.2, runner="compiled")
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return x


class Parallel(nn.Module):
    """As DistributedDataParallel, it holds what has no copy."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.reducer = module, threading.Lock()

    def forward(self, *arguments: Tensor, **named: Tensor) -> Tensor:
        return self.module(*arguments, **named)


def test_what_cannot_be_compiled_says_why(network: nn.Module) -> None:
    x, t, r, condition = problem()
    cases: list[tuple[Callable[..., Tensor], str]] = [
        (lambda x, t, label: x, "the field is a function"),
        (Uncopyable(), "module (Uncopyable) cannot be copied: "),
        (Parallel(network), "module (Parallel) cannot be copied; pass its .module, the MLP inside: "),
    ]
    for field, reason in cases:
        with pytest.raises(ValueError, match=r"runner='compiled' is not possible: " + re.escape(reason)):
            mfd_fast.mean_velocity(field, x, t, r, condition=condition, runner="compiled")
        report = mfd_fast.warmup(field, x, condition=condition)
        assert report.runner == "eager"
        assert report.reason.startswith(reason)
    with pytest.raises(ValueError, match="no gradient"):
        mfd_fast.mean_velocity(network, x, t, r, condition=condition, runner="compiled", differentiable=True)


def test_warmup_decides_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    linear.why_not_onednn()  # measures once, with the clock that is replaced below
    network = copy.deepcopy(make_network())
    x, t, r, condition = problem()

    def auto() -> mfd_fast.RolloutStats:
        return mfd_fast.mean_velocity(network, x, t, r, condition=condition, return_stats=True)[1]

    assert auto().runner == "eager"
    slow = {"eager": 3.0, "compiled": 1.0, "fused": 2.0}
    real = mfd_fast.mean_velocity
    now = [0.0]

    def timed(*arguments: object, runner: str, **options: object) -> object:
        now[0] += slow[runner]
        return real(*arguments, runner=runner, **options)

    monkeypatch.setattr(sys.modules["mfd_fast.warmup"], "mean_velocity", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    report = mfd_fast.warmup(network, x, condition=condition)
    assert (report.runner, report.seconds) == ("compiled", slow)
    assert report.compile_seconds == 9.0
    assert auto().runner == "compiled"
    assert "3.00 times as fast on 9 rows" in auto().reason
    u = real(network, x, t, r, condition=condition, differentiable=True)
    assert u.requires_grad
    slow["fused"] = 0.5
    assert mfd_fast.warmup(network, x, condition=condition).runner == "fused"
    assert auto().runner == "fused"
    # What the fastest cannot do, the next one does.
    assert mfd_fast.mean_velocity(network, x, t, r, condition=condition, solver="rk4", return_stats=True)[1].runner == (
        "compiled"
    )
    slow["compiled"] = slow["fused"] = 3.0
    assert mfd_fast.warmup(network, x, condition=condition).runner == "eager"
    assert auto().runner == "eager"


def test_onednn_is_used_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    from mfd_fast.rollout.compiled import CompiledCopy

    for reason in (None, "slower"):
        monkeypatch.setattr(linear, "why_not_onednn", lambda reason=reason: reason)
        copied = CompiledCopy(make_network())
        assert copied.uses_onednn is (reason is None)
    assert not CompiledCopy(make_network(torch.float64)).uses_onednn


def test_measured_choices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from mfd_fast.rollout.compiled import measured_choices

    cpu = torch.device("cpu")
    for reason, name in ((None, "oneDNN"), ("slower", "torch")):
        monkeypatch.setattr(linear, "why_not_onednn", lambda reason=reason: reason)
        assert measured_choices("compiled", cpu) == {"float32 matrix products": name}
    assert measured_choices("eager", cpu) == {}
    assert measured_choices("compiled", torch.device("cuda")) == {}


def test_auto_runs_eager_where_a_warm_module_is_wrapped_in_something_unknown(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mfd_fast.rollout import compiled

    class Wrapper:
        field = network

        def __call__(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
            return network(x, t, **condition)

    monkeypatch.setitem(compiled._WARM, network, compiled.Measured(("compiled",), "it was faster"))
    x, t, r, condition = problem()
    options = {"condition": condition, "return_stats": True}
    assert mfd_fast.mean_velocity(network, x, t, r, **options)[1].runner == "compiled"
    _, stats = mfd_fast.mean_velocity(Wrapper(), x, t, r, **options)
    assert stats.runner == "eager"
    assert stats.reason == "auto: mfd_fast.warmup has not found anything faster for this field"


class Shared(nn.Module):
    """One layer in two places, and one with a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(6, 6)
        self.hooked = nn.Linear(6, 6)
        self.hooked.register_forward_hook(lambda module, arguments, output: 2 * output)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.hooked(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_shared_and_hooked_layers_keep_their_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "why_not_onednn", lambda: None)
    field = Shared()
    assert_equal(field, step_size=0.2)
    data_copy(field)
    assert_equal(field, step_size=0.2)


def test_warmup_survives_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise TorchDynamoException("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", lambda module, **options: fail)
    field = fields.scaled_time(make_network(), 1.0)  # no other runner can run it
    x, t, r, condition = problem()
    report = mfd_fast.warmup(field, x, condition=condition)
    assert report == ("eager", "torch.compile failed: no C++ compiler", {}, 0.0)
    assert mfd_fast.mean_velocity(field, x, t, r, condition=condition, return_stats=True)[1].runner == "eager"
