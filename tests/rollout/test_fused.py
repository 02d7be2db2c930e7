"""The fused runner against eager: every option, changing weights, what it refuses, and when auto takes it."""

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

import mfd_fast
from mfd_fast import native
from mfd_fast.fields import autocast, scaled_time, sequential_mlp
from mfd_fast.models import build_model
from mfd_fast.ops import mlp_rollout as op
from mfd_fast.rollout import fused
from mfd_fast.rollout.compiled import Measured, measured_choices, remember

ROWS = 21


def make_network(seed: int = 0, width: int = 48) -> nn.Module:
    torch.manual_seed(seed)
    network = build_model("mlp", (1, 2, 3), 4, width=width, depth=2, time_features=8, condition_width=12)
    for parameter in network.requires_grad_(False).parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def problem() -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """States, intervals in both directions with an empty one, and a condition."""
    torch.manual_seed(1)
    x, t, r = torch.randn(ROWS, 1, 2, 3), torch.rand(ROWS), torch.rand(ROWS)
    r[3] = t[3]
    return (
        x,
        t,
        r,
        {"condition": {"label": torch.randint(0, 5, (ROWS,))}, "negative_condition": {"label": torch.tensor([4])}},
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert float((actual - expected).norm()) <= 1e-5 * float(expected.norm())


STEPS: list[dict[str, Any]] = [{}, {"steps": 1}, {"steps": 9}, {"step_size": 0.3}, {"max_evaluations": 6}]
SCALES: list[Any] = [1.0, 4.5, torch.linspace(0, 3, ROWS)]


@pytest.mark.parametrize(
    ("steps", "solver", "scale"),
    list(itertools.product(STEPS, ["euler", "ab2"], SCALES)),
    ids=lambda value: "by row" if isinstance(value, Tensor) else str(value),
)
def test_equals_eager(steps: dict[str, Any], solver: str, scale: Any) -> None:
    network, other = make_network(), make_network(1, 31)
    x, t, r, conditions = problem()
    options = {**steps, **conditions, "solver": solver, "guidance_scale": scale, "return_stats": True}
    for function in (mfd_fast.mean_velocity, mfd_fast.integrate):
        expected, stats = function(network, x, t, r, runner="eager", **options)
        actual, own = function(network, x, t, r, runner="fused", **options)
        assert_close(actual, expected)
        assert (own.runner, own.reason, own.first_bad) == ("fused", "asked for", None)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(own[:3], stats[:3], strict=True))
    if "max_evaluations" in steps:
        return
    expected = mfd_fast.mean_velocity_pair(network, other, x, t, r, runner="eager", **options)
    actual = mfd_fast.mean_velocity_pair(network, other, x, t, r, runner="fused", **options)
    for ours, theirs in zip(actual[:2], expected[:2], strict=True):
        assert_close(ours, theirs)
    for ours, theirs in zip(actual[2], expected[2], strict=True):
        assert torch.equal(ours.evaluations, theirs.evaluations)


@pytest.mark.parametrize("time", ["append", "prepend"])
def test_sequential_networks(time: str) -> None:
    torch.manual_seed(0)
    layers = [
        nn.SiLU(),
        nn.Linear(30, 30, bias=False),
        nn.GELU(),
        nn.Linear(30, 30),
        nn.Linear(30, 6),
    ]
    x, t, r, _ = problem()
    field = sequential_mlp(nn.Sequential(nn.Linear(9, 30), *layers).requires_grad_(False), time, "context", 2)
    for context in (torch.randn(ROWS, 2), torch.randn(1, 2)):
        options = {
            "condition": {"context": context},
            "negative_condition": {"context": 0 * context},
            "guidance_scale": 3.0,
        }
        expected = mfd_fast.mean_velocity(field, x, t, r, runner="eager", **options)
        assert_close(mfd_fast.mean_velocity(field, x, t, r, runner="fused", **options), expected)
    with pytest.raises(ValueError, match=r"context must be float32 of shape \[21 or 1, 2\], got torch.float64"):
        mfd_fast.mean_velocity(field, x, t, r, runner="fused", condition={"context": context.double()})


def test_plain_and_other_arguments_give_the_same() -> None:
    """The quick way and the long way; numbers, other layouts and dtypes of the times."""
    network = make_network()
    x, t, r, conditions = problem()
    options = {**conditions, "guidance_scale": 2.0, "runner": "fused"}
    quick = mfd_fast.mean_velocity(network, x, t, r, **options)
    assert torch.equal(mfd_fast.mean_velocity(network, x, t.double(), r.double(), **options), quick)
    assert torch.equal(
        mfd_fast.mean_velocity(network, x.transpose(2, 3).contiguous().transpose(2, 3), t, r, **options), quick
    )
    assert_close(
        mfd_fast.mean_velocity(network, x, 0.9, 0, **options),
        mfd_fast.mean_velocity(network, x, 0.9, 0, **options | {"runner": "eager"}),
    )
    empty = mfd_fast.mean_velocity(network, x[:0], t[:0], r[:0], runner="fused")
    assert empty.shape == (0, 1, 2, 3)


def test_pairs_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, auxiliary = make_network(), make_network(1)
    x, t, r, conditions = problem()
    calls: list[int] = []
    real = op.mlp_rollouts

    def counted(rollouts: Any) -> Any:
        calls.append(len(rollouts))
        return real(rollouts)

    monkeypatch.setattr(fused, "mlp_rollouts", counted)
    options = {**conditions, "guidance_scale": 4.5, "auxiliary_solver": "ab2", "auxiliary_step_size": 0.1}
    pair = mfd_fast.mean_velocity_pair(teacher, auxiliary, x, t, r, runner="fused", **options)
    assert calls == [2]
    expected = mfd_fast.mean_velocity_pair(teacher, auxiliary, x, t, r, runner="eager", **options)
    for ours, theirs in zip(pair, expected, strict=True):
        assert_close(ours, theirs)


def _fused_adamw(network: nn.Module) -> None:
    network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05, fused=True)
    sum(parameter.square().sum() for parameter in network.parameters()).backward()
    optimizer.step()
    network.requires_grad_(False)


def _foreach(network: nn.Module) -> None:
    torch._foreach_mul_([parameter.data for parameter in network.parameters()], 0.9)


def _load(network: nn.Module) -> None:
    network.load_state_dict(make_network(7).state_dict())


def _load_assign(network: nn.Module) -> None:
    network.load_state_dict(make_network(7).state_dict(), assign=True)


def _copy_data(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.data.copy_(0.8 * parameter.data)


def _swap(network: nn.Module) -> None:
    """As an EMA swap that exchanges tensors does it."""
    for parameter in network.parameters():
        parameter.data = 0.8 * parameter.data


def _exchange_layer(network: nn.Module) -> None:
    network.block_in[1] = copy.deepcopy(network.block_in[1])  # type: ignore[index,operator]
    network.block_in[1].weight.data.mul_(0.5)  # type: ignore[index,union-attr,operator]


@pytest.mark.parametrize("change", [_fused_adamw, _foreach, _load, _load_assign, _copy_data, _swap, _exchange_layer])
def test_weights_never_go_stale(change: Callable[[nn.Module], None]) -> None:
    network = make_network()
    x, t, r, conditions = problem()
    before = mfd_fast.mean_velocity(network, x, t, r, runner="fused", **conditions)
    change(network)
    after = mfd_fast.mean_velocity(network, x, t, r, runner="fused", **conditions)
    assert_close(after, mfd_fast.mean_velocity(network, x, t, r, runner="eager", **conditions))
    assert float((after - before).norm()) > 1e-3 * float(before.norm())


class _Subclass(type(make_network())):  # type: ignore[misc]
    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, t, label)


def _hooked() -> nn.Module:
    network = make_network()
    network.enter.register_forward_hook(lambda *_: None)  # type: ignore[union-attr,operator]
    return network


def _of_another_class() -> nn.Module:
    network = make_network()
    network.__class__ = _Subclass
    return network


def _normed() -> nn.Module:
    network = make_network()
    nn.utils.parametrizations.weight_norm(network.enter)  # type: ignore[arg-type]
    return network


def _with_second_time() -> nn.Module:
    network = make_network()
    network.condition.add_second_time()  # type: ignore[union-attr,operator]
    return network


PARTLY_GUIDED: dict[str, Any] = {
    "condition": {"label": torch.tensor([1])},
    "negative_condition": {"label": torch.tensor([4])},
    "guidance_scale": 2.0,
    "guidance_interval": (0.2, 0.8),
}
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "function": (lambda: lambda x, t: x, {}, "function without a method mlp_program"),
    "wrapper": (lambda: scaled_time(make_network(), 10.0), {}, "scaled_time without"),
    "autocast": (lambda: autocast(make_network(), torch.bfloat16), {}, "Autocast without"),
    "other model": (lambda: build_model("dit", (1, 2, 2), width=8, depth=1, heads=1, patch_size=1), {}, "DiT without"),
    "hook": (_hooked, {}, "a Linear has hooks"),
    "subclass": (_of_another_class, {}, "_Subclass has a forward of its own"),
    "parametrised": (_normed, {}, "ParametrizedLinear, not an nn.Linear"),
    "layer": (lambda: sequential_mlp(nn.Sequential(nn.Linear(7, 6), nn.LayerNorm(6))), {}, "a layer is a LayerNorm"),
    "nested": (lambda: sequential_mlp(nn.Sequential(nn.Sequential(nn.Linear(7, 6)))), {}, "a layer is a Sequential"),
    "features in": (lambda: sequential_mlp(nn.Sequential(nn.Linear(6, 6))), {}, "takes 6 features, it would get 7"),
    "features out": (lambda: sequential_mlp(nn.Sequential(nn.Linear(7, 5))), {}, "returns 5 features for a state of 6"),
    "low precision": (lambda: make_network().bfloat16(), {"field_dtype": torch.bfloat16}, "computes in float32"),
    "double": (lambda: make_network().double(), {}, "must be contiguous float32"),
    "gradient": (make_network, {"differentiable": True}, "no gradient"),
    "solver": (make_network, {"solver": "rk4"}, "euler and ab2, got solver='rk4'"),
    "adaptive": (make_network, {"solver": "bosh3"}, "euler and ab2"),
    "few rows": (make_network, {"max_rows": 4}, "16 rows at a time, got max_rows=4"),
    "second time": (_with_second_time, {}, "has a second time"),
    "partly guided": (make_network, PARTLY_GUIDED, "PartlyGuided without"),
    "condition": (make_network, {"condition": {"text": torch.zeros(1, 3)}}, "has the conditions: label; got text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_the_reason(name: str) -> None:
    make, options, message = REFUSED[name]
    x, t, r, _ = problem()
    if name == "other model":
        x = x[..., :2]
    with pytest.raises(ValueError, match=f"runner='fused' is not possible: .*{message}"):
        mfd_fast.mean_velocity(make(), x, t, r, runner="fused", **options)


def test_a_hook_that_comes_later_is_seen() -> None:
    network = make_network()
    x, t, r, _ = problem()
    mfd_fast.mean_velocity(network, x, t, r, runner="fused")
    network.leave.register_forward_hook(lambda module, inputs, output: 2 * output)  # type: ignore[union-attr,operator]
    with pytest.raises(ValueError, match="hooks"):
        mfd_fast.mean_velocity(network, x, t, r, runner="fused")


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "sequential_mlp"])
def test_a_network_is_not_kept_alive(wrapped: bool) -> None:
    network = nn.Sequential(nn.Linear(3, 2)) if wrapped else make_network()
    field, (x, t, r, _) = (sequential_mlp(network) if wrapped else network), problem()
    mfd_fast.mean_velocity(field, x.flatten(1)[:, :2] if wrapped else x, t, r, runner="fused")
    gone = weakref.ref(network)
    del network, field
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("limits", [{}, {"max_evaluations": 5}], ids=["quick", "checked"])
def test_counts_lie_on_the_cpu_whatever_the_default_device(limits: dict[str, Any]) -> None:
    network, (x, t, r, _) = make_network(), problem()
    how = {"runner": "fused", "return_stats": True, **limits}
    expected, stats = mfd_fast.mean_velocity(network, x, t, r, **how)
    with torch.device("meta"):
        found, same = mfd_fast.mean_velocity(network, x, t, r, **how)
    assert torch.equal(found, expected)
    for name in ("evaluations", "steps", "status"):
        assert torch.equal(getattr(same, name), getattr(stats, name)), name


def test_float64_states_are_refused() -> None:
    x, t, r, _ = problem()
    with pytest.raises(ValueError, match=r"it computes in float32, got x in torch\.float64"):
        mfd_fast.mean_velocity(make_network().double(), x.double(), t, r, runner="fused")


def test_without_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "core", lambda: None)
    monkeypatch.setattr(native, "why_no_core", lambda: "switched off")
    x, t, r, _ = problem()
    with pytest.raises(ValueError, match=r"the C\+\+ core is off: switched off"):
        mfd_fast.mean_velocity(make_network(), x, t, r, runner="fused")


def test_labels_out_of_range_are_the_error_of_the_network() -> None:
    x, t, r, _ = problem()
    for runner in ("eager", "fused"):
        with pytest.raises(ValueError, match=r"label must be in 0\.\.4 \(4 = no label\), got"):
            mfd_fast.mean_velocity(make_network(), x, t, r, runner=runner, condition={"label": torch.full((ROWS,), 9)})
        with pytest.raises(ValueError, match=r"label must be in 0\.\.4"):
            mfd_fast.mean_velocity_pair(
                *(make_network(), make_network(), x, t, r), runner=runner, condition={"label": torch.full((1,), -1)}
            )


@pytest.mark.parametrize("bad", ["x", "t"])
def test_bad_numbers_are_the_errors_of_every_runner(bad: str) -> None:
    x, t, r, _ = problem()
    (x if bad == "x" else t).view(ROWS, -1)[2] = float("nan")
    with pytest.raises(ValueError, match=f"{bad} must be finite, got (NaN or infinity|nan) in row 2"):
        mfd_fast.mean_velocity(make_network(), x, t, r, runner="fused")


def test_velocities_that_are_not_finite() -> None:
    network = make_network()
    x, t, r, _ = problem()
    network.condition.label.weight[1] = float("inf")  # type: ignore[union-attr,operator]
    label = torch.zeros(ROWS, dtype=torch.int64)
    label[5] = 1
    results = {}
    for runner in ("eager", "fused"):
        options = {"runner": runner, "condition": {"label": label}}
        with pytest.raises(FloatingPointError, match=f"row 5 at time {float(t[5]):g}"):
            mfd_fast.mean_velocity(network, x, t, r, **options)
        u, results[runner] = mfd_fast.mean_velocity(network, x, t, r, return_stats=True, **options)
        assert u.isfinite().flatten(1).all(1).logical_not().nonzero().tolist() == [[5]]
    assert torch.equal(results["eager"].status, results["fused"].status)
    assert results["eager"].first_bad == results["fused"].first_bad == (5, float(t[5]))


def test_auto_takes_what_was_measured() -> None:
    network = make_network()
    x, t, r, conditions = problem()

    def stats(**options: Any) -> mfd_fast.RolloutStats:
        return mfd_fast.mean_velocity(network, x, t, r, return_stats=True, **conditions, **options)[1]

    assert stats().runner == "eager"
    remember(network, Measured(("fused",), "faster"))
    assert stats()[3:5] == ("fused", "auto: faster")
    assert stats(steps=3, max_evaluations=2)[3:5] == ("fused", "auto: faster")
    assert stats(solver="heun")[3] == "eager"
    assert "euler and ab2" in stats(solver="heun").reason
    both = mfd_fast.mean_velocity_pair(network, make_network(1), x, t, r, return_stats=True)[2]
    assert (both.teacher.runner, both.auxiliary.runner) == ("fused", "eager")
    assert mfd_fast.mean_velocity(network, x, t, r, differentiable=True, **conditions).requires_grad is False


def test_warmup_measures_it_where_nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise TorchDynamoException("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda module, **options: fail)
    network = make_network()
    x, t, r, conditions = problem()
    report = mfd_fast.warmup(network, x, **conditions, guidance_scale=2.0)
    assert (report.runner, list(report.seconds)) == ("fused", ["eager", "fused"])
    assert mfd_fast.mean_velocity(network, x, t, r, return_stats=True)[1].runner == "fused"


def test_what_decides_about_bits() -> None:
    core = native.core()
    assert core is not None
    assert measured_choices("fused", torch.device("cpu")) == {"vectors of fused rollouts": max(core.MLP_LANES)}


def test_arguments_of_sequential_mlp() -> None:
    network = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="time must be 'append' or 'prepend', got 'last'"):
        sequential_mlp(network, "last")
    with pytest.raises(ValueError, match="condition and condition_width go together"):
        sequential_mlp(network, condition="c")
    with pytest.raises(ValueError, match="the condition must be None, got c"):
        sequential_mlp(network)(torch.zeros(1, 2), torch.zeros(1), c=torch.zeros(1, 1))
