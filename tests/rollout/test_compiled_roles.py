"""Roles of one backbone and low-precision fields through compiled copies: few graphs, no break, never stale."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import mfd_fast
from mfd_fast.fields import autocast
from mfd_fast.intervals import Uniform, sample_pairs
from mfd_fast.models import build_model
from mfd_fast.models.lora import LoRARoles
from mfd_fast.ops import linear
from mfd_fast.rollout.compiled import CompiledCopy
from mfd_fast.training.ema import WeightAverage

SHAPE = (1, 4, 4)
NEGATIVE = {"label": torch.tensor([3])}


def make_roles(name: str = "mlp") -> LoRARoles:
    options = {"mlp": {"width": 16, "depth": 1}, "dit": {"width": 16, "depth": 1, "heads": 2}}[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model(name, SHAPE, 3, **options).requires_grad_(False)
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        roles = LoRARoles(network, rank=2, alpha=2.0)
        for role in roles.roles:
            for parameter in roles.parameters(role):
                parameter.data += 0.3 * torch.randn_like(parameter)
    return roles


def arguments(rows: int, seed: int = 0) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    t, r = sample_pairs(Uniform(), rows, generator=generator)
    condition = {"label": torch.randint(0, 3, (rows,), generator=generator)}
    return (torch.randn(rows, *SHAPE, generator=generator), t, r), {"condition": condition, "step_size": 0.2}


def both_ways(roles: LoRARoles, rows: int, scale: float, dtype: torch.dtype | None = None) -> list[list[Tensor]]:
    """The pair eager and compiled."""
    fields = autocast(roles.teacher, dtype), autocast(roles.auxiliary, dtype)
    points, options = arguments(rows, seed=rows)
    options |= {"negative_condition": NEGATIVE, "guidance_scale": scale, "return_stats": True}
    found = []
    for runner in ("eager", "compiled"):
        *velocities, stats = mfd_fast.mean_velocity_pair(*fields, *points, runner=runner, **options)
        assert stats.teacher.runner == runner
        found.append(velocities)
    return found


@pytest.fixture
def whole_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiling fails where it would break a graph or exceed its limit; without generating code, to save time."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(real, fullgraph=True, backend="aot_eager"))
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.mark.usefixtures("whole_graphs")
@pytest.mark.parametrize("name", ["mlp", "dit"])
def test_two_graphs_for_all_pairs(name: str) -> None:
    roles = make_roles(name)
    for scale in (4.5, 1.0):
        for rows in (5, 9, 1, 2, 12, 3):
            eager, compiled = both_ways(roles, rows, scale)
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.usefixtures("whole_graphs")
def test_roles_alone_and_unusual_groups() -> None:
    roles = make_roles()
    for field in (roles.teacher, roles.auxiliary, roles.student):
        for rows in (4, 1, 7):
            points, options = arguments(rows)
            options |= {"negative_condition": NEGATIVE, "guidance_scale": 2.0}
            eager, compiled = (
                mfd_fast.mean_velocity(field, *points, runner=runner, **options) for runner in ("eager", "compiled")
            )
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 6, "one row and several, for each role"


@pytest.mark.usefixtures("whole_graphs")
def test_more_networks_of_a_class_than_the_compiler_keeps_graphs_for_one_function() -> None:
    class Constant(nn.Module):
        def __init__(self, value: int) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.full_like(x, self.value)

    networks = [Constant(value) for value in range(torch._dynamo.config.recompile_limit + 3)]
    x = torch.zeros(3, 2)
    found = [float(mfd_fast.mean_velocity(network, x, 0.5, 0.1, runner="compiled")[0, 0]) for network in networks]
    assert found == pytest.approx(list(range(len(networks))))
    assert counters["stats"]["unique_graphs"] == len(networks)


@pytest.fixture(scope="module")
def changing() -> LoRARoles:
    return make_roles()


def step(roles: LoRARoles, optimizer: torch.optim.Optimizer) -> None:
    points, options = arguments(6)
    torch.autograd.backward(roles.auxiliary(points[0], points[1], **options["condition"]).square().mean())
    optimizer.step()
    optimizer.zero_grad()


def fused_adamw(roles: LoRARoles) -> None:
    step(roles, torch.optim.AdamW(roles.parameters("auxiliary"), lr=0.1, fused=True))


def foreach_sgd(roles: LoRARoles) -> None:
    step(roles, torch.optim.SGD(roles.parameters("auxiliary"), lr=0.1, foreach=True))


def load_state_dict(roles: LoRARoles) -> None:
    roles.load_state_dict("auxiliary", {name: 0.8 * value for name, value in roles.state_dict("auxiliary").items()})


def data_copy(roles: LoRARoles) -> None:
    for parameter in roles.parameters("auxiliary"):
        parameter.data.copy_(0.8 * parameter.data)


def data_replaced(roles: LoRARoles) -> None:
    for parameter in roles.parameters("auxiliary"):
        parameter.data = 0.8 * parameter.data


def average_swapped(roles: LoRARoles) -> None:
    average = WeightAverage(roles.parameters("auxiliary"), 0.5)
    data_copy(roles)
    average.applied().__enter__()
    data_copy(roles)


def backbone_changed(roles: LoRARoles) -> None:
    with torch.no_grad():
        roles.module.get_parameter("leave.bias").add_(1.0)


CHANGES = [fused_adamw, foreach_sgd, load_state_dict, data_copy, data_replaced, average_swapped, backbone_changed]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_of_roles_are_never_stale(changing: LoRARoles, change: Callable[[LoRARoles], None]) -> None:
    """With generated code, compiled once for all changes."""
    before = both_ways(changing, 6, 4.5)[1]
    change(changing)
    eager, compiled = both_ways(changing, 6, 4.5)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    assert float((compiled[1] - before[1]).abs().max()) > 1e-3


@pytest.mark.usefixtures("whole_graphs")
@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 4.5), (torch.float16, 1.0)], ids=["bfloat16", "float16"])
def test_autocast_is_kept(dtype: torch.dtype, scale: float) -> None:
    roles = make_roles()
    eager, compiled = both_ways(roles, 6, scale, dtype)
    points, options = arguments(6, seed=6)
    exact = mfd_fast.mean_velocity_pair(
        roles.teacher, roles.auxiliary, *points, negative_condition=NEGATIVE, guidance_scale=scale, **options
    )
    for ours, theirs, truth in zip(compiled, eager, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # the same operations in the same precision
        assert 1e-5 < float((ours - truth).norm() / truth.norm()) < 0.05, "low precision is what was asked for"


def test_onednn_reaches_the_layers_under_the_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "why_not_onednn", lambda: None)
    roles = make_roles("dit")
    copied = CompiledCopy(roles.grouped)
    assert copied.uses_onednn
    products = [part for part in copied._copy.modules() if isinstance(part, linear.OneDNNLinear)]
    assert len(products) == len(roles.layers) > 5
    assert all(type(layer.base) is nn.Linear for layer in roles.layers.values()), "the roles themselves are left alone"


@pytest.mark.usefixtures("whole_graphs")
@pytest.mark.parametrize("shared", [True, False], ids=["one backbone", "two networks"])
def test_warmup_of_a_pair_decides_for_auto(monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    from mfd_fast.rollout import compiled

    roles, other = make_roles(), make_roles()
    teacher, auxiliary = (roles.teacher, roles.auxiliary) if shared else (roles.module, other.module)
    points, options = arguments(6)
    options |= {"negative_condition": NEGATIVE, "guidance_scale": 2.0}

    def auto() -> mfd_fast.PairStats:
        stats: mfd_fast.PairStats = mfd_fast.mean_velocity_pair(
            teacher, auxiliary, *points, return_stats=True, **options
        )[2]
        return stats

    assert auto().teacher.runner == auto().auxiliary.runner == "eager"
    del options["step_size"]
    report = mfd_fast.warmup(teacher, points[0], auxiliary=auxiliary, **options)
    assert report.seconds.keys() >= {"eager", "compiled"}
    for field in (teacher, auxiliary):
        module = compiled.network_of(field)
        assert module is not None
        compiled.remember(module, compiled.Measured(("compiled",), "it was faster"))
    graphs = counters["stats"]["unique_graphs"]
    assert auto().teacher.runner == auto().auxiliary.runner == "compiled"
    assert counters["stats"]["unique_graphs"] == graphs, "all graphs were there"
