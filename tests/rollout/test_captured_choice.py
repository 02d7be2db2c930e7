"""When evaluations are recorded, and what is said when they are not; see test_captured.py."""

import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_recorded import GUIDED, Network, assert_equal, both, data_copy, problem
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import mfd_fast
from mfd_fast import fields
from mfd_fast.models import build_model
from mfd_fast.ops import linear
from mfd_fast.rollout import captured, graphs
from mfd_fast.rollout.compiled import Measured, remember


class Plain:
    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return -x


def sharded(network: Network) -> Network:
    """As FSDP does, whose weights lie elsewhere in each evaluation."""
    network.leave.weight = nn.Parameter(TwoTensor(network.leave.weight.data, network.leave.weight.data))
    return network


REFUSED: dict[str, tuple[Callable[[Network], Any], dict[str, Any], str]] = {
    "function": (lambda _: lambda x, t, label: x, {}, "the field is a function, not an nn.Module"),
    "object": (lambda _: Plain(), {}, "the field is a Plain, not an nn.Module"),
    "wrapped-function": (lambda _: fields.reversed_time(Plain()), {}, "the field is a Plain"),
    "adaptive": (lambda network: network, {"solver": "bosh3"}, "only fixed steps"),
    "library": (lambda network: network, {"solver": "torchdiffeq:rk4"}, "only fixed steps"),
    "gradient": (lambda network: network, {"differentiable": True}, "no gradient"),
    "sharded": (sharded, {}, "its weights are of class TwoTensor: a graph"),
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
