"""The kernels of SANA against their definitions: in Triton's interpreter, and by the way they are called.

The interpreter computes products of bfloat16 wrongly (it takes their bits for integers), so 16-bit cases are float16.
"""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mfd_fast.ops import gated_depthwise, launchers, linear_attention, without_gradient

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RTOL = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


class Case(NamedTuple):
    """Inputs of one kernel."""

    kernel: str
    arguments: dict[str, Tensor]
    settings: dict[str, Any]

    def expected(self) -> Tensor:
        """The definition, in float64."""
        wide = [value.double() for value in self.arguments.values()]
        if self.kernel == "linear_attention":
            return linear_attention.linear_attention_reference(*wide, self.settings["heads"])
        return gated_depthwise.gated_depthwise_reference(*wide)


def attention_case(batch: int, tokens: int, heads: int, head_dim: int, magnitude: float = 1.0, **more: Any) -> Case:
    generator = torch.Generator().manual_seed(tokens)
    shape = (batch, tokens, heads * head_dim)
    values = {name: magnitude * torch.randn(shape, generator=generator).half().float() for name in "qkv"}
    return Case("linear_attention", values, {"heads": heads, **more})


def depthwise_case(batch: int, height: int, width: int, channels: int) -> Case:
    generator = torch.Generator().manual_seed(height * width)
    shapes = {"x": (batch, height, width, 2 * channels), "weight": (2 * channels, 1, 3, 3), "bias": (2 * channels,)}
    values = {name: torch.randn(shape, generator=generator).half().float() for name, shape in shapes.items()}
    return Case("gated_depthwise", values, {})


CASES: dict[str, Callable[[], Case]] = {
    "one token": lambda: attention_case(1, 1, 1, 16),
    "whole blocks": lambda: attention_case(1, 128, 2, 32),
    "part of a block": lambda: attention_case(2, 100, 3, 32),
    "large heads": lambda: attention_case(1, 70, 1, 64),
    "slices of a projection": lambda: attention_case(2, 33, 2, 16, interleaved=True),
    "sums beyond float16": lambda: attention_case(1, 128, 1, 16, magnitude=60.0),
    "no tokens": lambda: attention_case(2, 0, 2, 16),
    "no pictures to mix": lambda: attention_case(0, 5, 2, 16),
    "no pictures to filter": lambda: depthwise_case(0, 3, 3, 4),
    "one pixel": lambda: depthwise_case(1, 1, 1, 1),
    "part of a tile": lambda: depthwise_case(2, 5, 7, 70),
    "several tiles": lambda: depthwise_case(1, 3, 20, 65),
}
DTYPES = ("float32", "float16")


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[..., dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What the kernels make of every case: ``CASE DTYPE``."""
    given: dict[str, np.ndarray] = {}
    for name, make in CASES.items():
        for dtype in DTYPES:
            case = make()
            given |= {f"{name} {dtype}/{key}": value.numpy() for key, value in case.arguments.items()}
            settings = case.settings | {"dtype": dtype, "kernel": case.kernel, "arguments": list(case.arguments)}
            given[f"{name} {dtype}/settings"] = np.array(json.dumps(settings))
    return interpret("interpret_sana.py", given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_kernels_match_their_definitions(interpreted: dict[str, np.ndarray], name: str, dtype: str) -> None:
    expected = CASES[name]().expected()
    ours = torch.from_numpy(interpreted[f"{name} {dtype}"]).double()
    assert ours.shape == expected.shape
    assert (ours - expected).norm() <= RTOL[dtype] * expected.norm()
    assert interpreted[f"{name} {dtype}/intact"]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CPU tensors go where CUDA tensors go; the launchers write down that they were called."""
    calls: list[str] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        assert all(part.stride(-1) == 1 for part in (q, k, v))
        calls.append("linear_attention")
        return linear_attention.linear_attention_reference(q, k, v, heads).contiguous()

    def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        assert all(part.is_contiguous() for part in (x, weight, bias))
        calls.append("gated_depthwise")
        return gated_depthwise.gated_depthwise_reference(x, weight, bias).contiguous()

    kernels = SimpleNamespace(
        HEAD_DIMS=(16, 32, 64), launch_linear_attention=attention, launch_gated_depthwise=depthwise
    )
    monkeypatch.setattr(without_gradient, "DEVICES", ["cpu"])
    monkeypatch.setattr(launchers, "load", lambda name, device: kernels)
    return calls


def both(case: str, *, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    """The operation and its definition."""
    made = CASES[case]()
    tensors = [value.to(dtype).requires_grad_(requires_grad) for value in made.arguments.values()]
    if made.kernel == "linear_attention":
        heads = made.settings["heads"]
        ours = linear_attention.relu_linear_attention(*tensors, heads)
        return ours, linear_attention.linear_attention_reference(*tensors, heads)
    return gated_depthwise.silu_depthwise_gate(*tensors), gated_depthwise.gated_depthwise_reference(*tensors)


@pytest.mark.parametrize("case", ["part of a block", "part of a tile"])
def test_kernels_run_where_no_gradient_is_wanted(recorded: list[str], case: str) -> None:
    kernel = CASES[case]().kernel
    torch.testing.assert_close(*both(case))
    assert recorded == [kernel]
    with torch.no_grad():
        both(case, requires_grad=True)
    assert recorded == [kernel] * 2
    ours, _ = both(case, requires_grad=True)
    assert ours.requires_grad
    both(case, dtype=torch.float64)
    assert recorded == [kernel] * 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning:torch")
def test_transforms_of_torch_func_take_the_definition(recorded: list[str]) -> None:
    q, k, v = CASES["part of a block"]().arguments.values()

    def mixed(q: Tensor) -> Tensor:
        return linear_attention.relu_linear_attention(q, k, v, 3)

    value, tangent = torch.func.jvp(mixed, (q,), (q,))
    assert recorded == []
    torch.testing.assert_close(value, mixed(q))
    assert tangent.abs().max() < 1e-4  # the same for every multiple of q


def test_what_the_kernel_cannot_do_the_definition_does(recorded: list[str]) -> None:
    q, k, v = torch.randn(3, 2, 7, 2 * 20)
    ours = linear_attention.relu_linear_attention(q, k, v, 2)
    assert torch.equal(ours, linear_attention.linear_attention_reference(q, k, v, 2))
    assert recorded == []
    transposed = torch.randn(3, 2, 32, 7).transpose(2, 3)
    linear_attention.relu_linear_attention(*transposed, 2)
    assert recorded == ["linear_attention"]


def test_without_kernels_the_definitions_run(recorded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "load", lambda name, device: None)
    for case in ("part of a block", "part of a tile"):
        torch.testing.assert_close(*both(case))
    assert recorded == []


@pytest.mark.slow
def test_operations_are_traced_into_one_graph(recorded: list[str]) -> None:
    def both_operations(q: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        mixed = linear_attention.relu_linear_attention(q, q + 1, q, 2)
        return mixed, gated_depthwise.silu_depthwise_gate(x, weight, bias)

    arguments = (torch.randn(2, 9, 32), *CASES["part of a tile"]().arguments.values())
    compiled = torch.compile(both_operations, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ours, theirs in zip(compiled(*arguments), both_operations(*arguments), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert sorted(recorded) == ["gated_depthwise"] * 2 + ["linear_attention"] * 2
    for operator, given in ((linear_attention._fast, (*arguments[:1] * 3, 2)), (gated_depthwise._fast, arguments[1:])):
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("name", [name for name in CASES if "beyond" not in name])
def test_kernels_match_their_definitions_on_cuda(name: str, dtype: str) -> None:
    case = CASES[name]()
    given = {key: value.to(getattr(torch, dtype)) for key, value in case.arguments.items()}
    expected, tensors = case._replace(arguments=given).expected(), [value.cuda() for value in given.values()]
    if case.kernel == "linear_attention":
        ours = linear_attention.relu_linear_attention(*tensors, case.settings["heads"])
    else:
        ours = gated_depthwise.silu_depthwise_gate(*tensors)
    assert (ours.double().cpu() - expected).norm() <= RTOL[dtype] * expected.norm()
