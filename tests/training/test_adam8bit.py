"""AdamW with moments of 8 bits: as good as AdamW, exact through a checkpoint, and honest where it is not to be had."""

import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfd_fast.config import OptimizerSettings
from mfd_fast.training.adam8bit import flatten, unflatten
from mfd_fast.training.distributed import World
from mfd_fast.training.optimizing import RoleOptimizer

SETTINGS = OptimizerSettings(name="adamw8bit", learning_rate=1e-2, weight_decay=0.1)
TARGET = torch.linspace(-1, 1, 64 * 128).reshape(64, 128)


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(64, 128)), nn.Parameter(torch.ones(3))]


def make(parameters: list[nn.Parameter], settings: OptimizerSettings = SETTINGS) -> RoleOptimizer:
    return RoleOptimizer(parameters, settings, total_updates=100, precision="float32", world=World())


def update(optimizer: RoleOptimizer, parameters: list[nn.Parameter], count: int, bad: bool = False) -> None:
    for _ in range(count):
        big, small = parameters
        loss: Tensor = (big - TARGET).square().mean() + (small * torch.tensor([1.0, 2.0, 3.0])).square().sum()
        optimizer.backward(loss * (float("nan") if bad else 1.0), 1)
        optimizer.step()


@pytest.fixture(params=["bitsandbytes", "torchao"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each library as the only one that there is."""
    pytest.importorskip(request.param)
    other = {"bitsandbytes": "torchao", "torchao": "bitsandbytes"}[request.param]
    monkeypatch.setitem(sys.modules, other, None)
    monkeypatch.setitem(sys.modules, f"{other}.optim", None)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, which is not what is tested
        yield request.param


def test_it_follows_adamw(library: str) -> None:
    eight, full = weights(), weights()
    first, second = make(eight), make(full, OptimizerSettings(name="adamw", learning_rate=1e-2, weight_decay=0.1))
    assert (first.kind, first.note) == (library, None)
    update(first, eight, 20)
    update(second, full, 20)
    torch.testing.assert_close(eight[0], full[0], atol=1e-2, rtol=0.0)  # 5 % of how far 20 updates of 0.01 go
    torch.testing.assert_close(eight[1], full[1], atol=1e-5, rtol=0.0)  # small weights keep float32 moments
    assert not torch.equal(full[0], eight[0])


def test_a_resume_is_exact(library: str) -> None:
    straight = weights()
    whole = make(straight)
    update(whole, straight, 7)

    begun = weights()
    before = make(begun)
    update(before, begun, 4)
    tensors = {name: value.clone() for name, value in before.tensors().items()}
    numbers = json.loads(json.dumps(before.numbers()))
    assert any(value.dtype == torch.uint8 for value in tensors.values())

    after = make(begun)
    after.load(tensors, numbers)
    update(after, begun, 3)
    for ours, expected in zip(begun, straight, strict=True):
        assert torch.equal(ours, expected)
    assert after.updates == 7


def test_gradients_that_are_not_finite_change_nothing(library: str) -> None:
    parameters = weights()
    optimizer = make(parameters)
    update(optimizer, parameters, 2)
    kept = [parameter.detach().clone() for parameter in parameters]
    state = {name: value.clone() for name, value in optimizer.tensors().items()}
    update(optimizer, parameters, 1, bad=True)
    assert all(torch.equal(a, b) for a, b in zip(parameters, kept, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in optimizer.tensors().items())


def test_without_a_library_moments_are_float32_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}.optim", None)
    parameters, others = weights(), weights()
    optimizer, adamw = make(parameters), make(others, OptimizerSettings(learning_rate=1e-2, weight_decay=0.1))
    assert optimizer.kind == "adamw"
    assert optimizer.note is not None
    assert "pip install bitsandbytes" in optimizer.note
    update(optimizer, parameters, 3)
    update(adamw, others, 3)
    assert torch.equal(parameters[0], others[0])


def test_another_librarys_state_is_refused() -> None:
    optimizer = make(weights(), OptimizerSettings())
    numbers = optimizer.numbers() | {"kind": "bitsandbytes"}
    with pytest.raises(ValueError, match=r"optimiser state of bitsandbytes, here adamw"):
        optimizer.load({}, numbers)


def test_state_is_taken_apart_and_put_together() -> None:
    state = {"step": 3, "moment": torch.ones(2), "inside": {"codes": torch.zeros(2, dtype=torch.uint8), "count": 1}}
    tensors, others = flatten(state)
    assert set(tensors) == {"moment", "inside/codes"}
    assert others == {"step": 3, "inside/count": 1}
    again = unflatten(tensors, others)
    assert (again["inside"]["count"], again["step"]) == (1, 3)
    assert torch.equal(again["moment"], state["moment"])
