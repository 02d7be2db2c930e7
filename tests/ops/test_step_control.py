"""The Triton kernels of the step control in Triton's interpreter, and which implementation is chosen when."""

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mfd_fast import native
from mfd_fast.ops import launchers
from mfd_fast.ops import step_control as op
from mfd_fast.ops.step_control import ControlState, advance_reference
from mfd_fast.step_control import AdaptiveSteps
from mfd_fast.types import Status

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Proposal(NamedTuple):
    """A call of `advance`."""

    control: AdaptiveSteps
    state: ControlState
    r: Tensor
    x: Tensor
    candidate: Tensor
    error: Tensor
    error_order: int


def make_state(t: Tensor, step: Tensor, previous_error: Tensor, status: Tensor) -> ControlState:
    return ControlState(t, step, previous_error, status, torch.zeros(len(t), dtype=torch.bool))


def random_proposal(seed: int, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> Proposal:
    """Rows in every situation, with settings that depend on the seed."""
    generator = np.random.default_rng(seed)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values)).to(dtype)

    t, r = tensor(generator.random(rows)), tensor(generator.random(rows))
    share = generator.choice([1e-9, 0.01, 0.3, 0.9999999, 1.0], rows)
    step = torch.where(tensor(share) == 1, r - t, tensor(share) * (r - t))
    previous_error = tensor(10.0 ** generator.uniform(-4, 0, rows))
    status = torch.from_numpy(generator.choice([4, 4, 4, 4, 4, 4, 0, 3], rows))
    x, candidate = (tensor(generator.normal(size=(rows, *shape))) for _ in range(2))
    magnitude = 10.0 ** generator.choice([-30, -6, -3, -2, -1, 2, 6, 25], size=(rows, *(1 for _ in shape)))
    error = tensor(generator.normal(size=(rows, *shape)) * magnitude)
    # NaN or infinity in the last element of some rows.
    for target, value in ((x, math.nan), (candidate, math.inf), (error, math.nan)):
        target.view(rows, math.prod(shape))[torch.from_numpy(generator.random(rows) < 0.05), -1:] = value
    control = AdaptiveSteps(max_step=(None, 0.02, 0.5)[seed % 3], max_factor=(5.0, 1e6)[seed % 2])
    return Proposal(control, make_state(t, step, previous_error, status), r, x, candidate, error, 1 + seed % 5)


E_OF_ROW = {
    "accepted": 0.5,
    "rejected": 3.0,
    "last-step": 0.25,
    "no-error": 0.0,
    "step-below-resolution": 1e4,
    "beyond-the-range-of-squares": 1e30,
    "nan-x": 0.5,
    "infinite-candidate": 0.5,
    "nan-error": math.nan,
    "infinite-error": -math.inf,
    "nearly-reached": 0.0,
    "not-quite-reached": 0.0,
    "success": math.nan,
    "max-evaluations": math.nan,
    "underflow": 0.5,
    "non-finite": 0.5,
}
"""Rows made by hand: the scaled error of each."""


def every_outcome(width: int, dtype: torch.dtype) -> Proposal:
    """The rows of `E_OF_ROW`, all of them from 0.9 to 0.2, with x = 0, so that the scaled error is the error."""
    names = list(E_OF_ROW)
    n = len(names)
    t, r, step = (torch.full((n,), value, dtype=dtype) for value in (0.9, 0.2, -0.1))
    previous_error, status = torch.full_like(t, 0.3), torch.full((n,), int(Status.RUNNING))
    error = torch.tensor(list(E_OF_ROW.values()), dtype=dtype)[:, None].repeat(1, width)
    x, candidate = torch.zeros(2, n, width, dtype=dtype)
    x[names.index("nan-x"), -1] = math.nan
    candidate[names.index("infinite-candidate"), -1] = math.inf
    step[names.index("last-step")] = (r - t)[0]
    step[names.index("step-below-resolution")] = -1e-17
    # The next step, max_factor = 6 times this one, is the gap that this one leaves times (1 - shortfall).
    for name, shortfall in (("nearly-reached", 0.995e-6), ("not-quite-reached", 1.005e-6)):
        step[names.index(name)] = -0.7 * (1 - shortfall) / (7 - shortfall)
    for name in ("success", "max-evaluations", "underflow", "non-finite"):
        status[names.index(name)] = list(Status)[["success", "max-evaluations", "underflow", "non-finite"].index(name)]
    control = AdaptiveSteps(rtol=0.0, atol=1.0, max_factor=6.0)
    return Proposal(control, make_state(t, step, previous_error, status), r, x, candidate, error, 3)


SIZES = [
    *((rows, shape) for rows in (1, 40) for shape in ((), (1,), (2,), (5,), (17,))),
    *((9, (width,)) for width in (33, 63, 64)),
    *((5, shape) for shape in ((65,), (3, 7, 11), (2047,), (2048,), (2049,))),
    *((2, (33_000,)), (70, (100,)), (0, (3,)), (3, (0,))),
]
"""Both paths of the kernels (up to 64 elements a row, and longer), full and partly filled programs and pieces."""

CASES: dict[str, Callable[[], Proposal]] = {}
for _dtype in DTYPES:
    for _width in (2, 130):
        CASES[f"outcomes-{_width}-{_dtype}"] = lambda w=_width, d=_dtype: every_outcome(w, DTYPES[d])
    for _seed, (_rows, _shape) in enumerate(SIZES):
        CASES[f"{_rows}-rows-of-{'x'.join(map(str, _shape)) or 'scalars'}-{_dtype}"] = (
            lambda s=_seed, n=_rows, shape=_shape, d=_dtype: random_proposal(s, n, shape, DTYPES[d])
        )


def arguments(proposal: Proposal) -> dict[str, np.ndarray]:
    control, state = proposal.control, proposal.state
    settings = {name: getattr(control, name) for name in ("rtol", "atol", "safety", "min_factor", "max_factor")}
    settings |= {"max_step": control.largest_step, "error_order": proposal.error_order}
    tensors = {name: getattr(state, name) for name in ControlState._fields[:4]}
    tensors |= {name: getattr(proposal, name) for name in ("r", "x", "candidate", "error")}
    return {name: tensor.numpy() for name, tensor in tensors.items()} | {"settings": np.array(json.dumps(settings))}


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[..., dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What the kernels make of every case: ``CASE/RESULT``."""
    given = {f"{case}/{name}": array for case, make in CASES.items() for name, array in arguments(make()).items()}
    return interpret("interpret_step_control.py", given)


def clearly_decided(proposal: Proposal) -> Tensor:
    """Rows whose error is not so close to 1 that rounding decides."""
    scale = proposal.control.atol + proposal.control.rtol * torch.maximum(proposal.x.abs(), proposal.candidate.abs())
    ratio = (proposal.error.double() / scale).reshape(len(proposal.r), math.prod(proposal.x.shape[1:]))
    e = ratio.square().mean(1).sqrt()
    return ((e - 1).abs() > 1e-5) | e.isnan()


def assert_matches(after: ControlState, expected: ControlState, clear: Tensor, case: str) -> None:
    rtol = 1e-12 if expected.t.dtype == torch.float64 else 1e-6
    for name, ours, theirs in zip(ControlState._fields, after, expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        exact = name in ("t", "status", "accepted")
        torch.testing.assert_close(
            ours[clear],
            theirs[clear],
            rtol=0.0 if exact else rtol,
            atol=0.0,
            msg=lambda text, name=name: f"{case}, {name}: {text}",
        )


@pytest.mark.parametrize("case", CASES)
def test_kernels_match_reference(interpreted: dict[str, np.ndarray], case: str) -> None:
    proposal = CASES[case]()
    expected = advance_reference(*proposal)
    after = ControlState(*(torch.from_numpy(interpreted[f"{case}/{name}"]) for name in ControlState._fields))
    clear = clearly_decided(proposal)
    assert clear.float().mean() > 0.5 or len(clear) == 0
    assert_matches(after, expected, clear, case)
    assert interpreted[f"{case}/intact"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 130], ids=["one-launch", "two-launches"])
def test_every_outcome(interpreted: dict[str, np.ndarray], width: int, dtype: str) -> None:
    """The same rows, exactly, and that each is what its name says."""
    case = f"outcomes-{width}-{dtype}"
    proposal = CASES[case]()
    before = proposal.state
    after = ControlState(*(torch.from_numpy(interpreted[f"{case}/{name}"]) for name in ControlState._fields))
    status = dict(zip(E_OF_ROW, map(Status, after.status.tolist()), strict=True))
    row = {name: index for index, name in enumerate(E_OF_ROW)}
    finished = {"success": Status.SUCCESS, "max-evaluations": Status.MAX_EVALUATIONS}
    finished |= {"underflow": Status.STEP_SIZE_UNDERFLOW, "non-finite": Status.NON_FINITE}
    expected = dict.fromkeys(E_OF_ROW, Status.RUNNING) | finished
    expected |= {"last-step": Status.SUCCESS, "step-below-resolution": Status.STEP_SIZE_UNDERFLOW}
    expected |= dict.fromkeys(["nan-x", "infinite-candidate", "nan-error", "infinite-error"], Status.NON_FINITE)
    assert status == expected
    assert after.t[row["last-step"]] == proposal.r[row["last-step"]]
    assert [name for name, accepted in zip(E_OF_ROW, after.accepted.tolist(), strict=True) if accepted] == [
        *("accepted", "last-step", "no-error", "nearly-reached", "not-quite-reached")
    ]
    gap = proposal.r - after.t
    if dtype == "float64":
        assert after.step[row["nearly-reached"]] == gap[row["nearly-reached"]]
        assert after.step[row["not-quite-reached"]] != gap[row["not-quite-reached"]]
    for name in (*finished, "nan-x", "infinite-candidate", "nan-error", "infinite-error"):
        kept = [torch.equal(new[row[name]], old[row[name]]) for new, old in zip(after[:3], before[:3], strict=True)]
        assert kept == [True, True, True], name


def test_buffer_of_partial_sums_only_for_long_rows(interpreted: dict[str, np.ndarray]) -> None:
    """Five outputs, and a sixth buffer where a row takes more than one program."""
    buffers = {case: int(interpreted[f"{case}/buffers"]) for case in CASES}
    assert buffers["9-rows-of-64-float32"] == 5
    assert buffers["5-rows-of-65-float32"] == 6


Calls = list[tuple[tuple[Tensor, ...], dict[str, float]]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """CPU tensors go where CUDA tensors go, and the launcher there only writes its arguments down."""
    calls: Calls = []

    def launch(*tensors: Tensor, **settings: float) -> tuple[Tensor, ...]:
        calls.append((tensors, settings))
        return (*tensors[:4], torch.ones(len(tensors[0]), dtype=torch.bool))

    monkeypatch.setitem(op._FAST, "cpu", op._FAST["cuda"])
    monkeypatch.setattr(launchers, "load", lambda name, device: SimpleNamespace(launch_step_control=launch))
    return calls


def test_launcher_gets_contiguous_tensors_and_every_setting(recorded: Calls) -> None:
    control = AdaptiveSteps(rtol=0.1, atol=0.2, safety=0.8, min_factor=0.3, max_factor=4.0)
    state = control.start(torch.ones(6)[::2], torch.zeros(3))
    x = torch.randn(4, 3).t().requires_grad_()
    after = control.advance(state, torch.zeros(1).expand(3), x, 2 * x, 0.1 * x, 3)
    ((tensors, settings),) = recorded
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in tensors)
    for given, expected in zip(tensors, (*state[:4], torch.zeros(3), x, 2 * x, 0.1 * x), strict=True):
        assert torch.equal(given, expected)
    limits = {"max_step": math.inf, "safety": 0.8, "min_factor": 0.3, "max_factor": 4.0}
    assert settings == {"error_order": 3, "rtol": 0.1, "atol": 0.2} | limits
    assert after.accepted.tolist() == [True] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_go_to_the_definition(recorded: Calls, dtype: torch.dtype) -> None:
    control = AdaptiveSteps()
    state = control.start(torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype))
    x = torch.zeros(2, 3, dtype=dtype)
    assert control.advance(state, torch.zeros(2, dtype=dtype), x, x, x, 3).accepted.tolist() == [True, True]
    assert recorded == []


# Forward derivatives of torch use a deprecated part of torch.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning:torch")
@pytest.mark.parametrize("fast", ["cpu", "cuda"])
def test_decisions_are_constants_under_transforms(fast: str, recorded: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.func wraps has no memory that compiled code could read; the tangent of a decision is zero."""
    monkeypatch.setitem(op._FAST, "cpu", {"cpu": op._run_core, "cuda": op._run_triton}[fast])
    control = AdaptiveSteps()
    state, r = control.start(torch.ones(3), torch.zeros(3)), torch.zeros(3)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

    def next_step(x: Tensor) -> Tensor:
        return control.advance(state, r, x, 2 * x, 0.05 * x, 3).step

    step, tangent = torch.func.jvp(next_step, (x,), (x,))
    assert torch.equal(step, advance_reference(control, state, r, x, 2 * x, 0.05 * x, 3).step)
    assert torch.equal(tangent, torch.zeros(3))
    assert torch.equal(torch.func.grad(lambda x: next_step(x).sum())(x), torch.zeros(3, 4))
    assert recorded == []


def test_without_fast_code_the_definition_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "load", lambda name, device: None)
    monkeypatch.setattr(native, "core", lambda: None)
    proposal = random_proposal(1, 7, (5,), torch.float32)
    for fast in (op._run_core, op._run_triton):
        monkeypatch.setitem(op._FAST, "cpu", fast)
        after = op.advance(*proposal)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, advance_reference(*proposal), strict=True))


def on_cuda(proposal: Proposal) -> Proposal:
    state = ControlState(*(part.cuda() for part in proposal.state))
    tensors = (getattr(proposal, name).cuda() for name in ("r", "x", "candidate", "error"))
    return Proposal(proposal.control, state, *tensors, proposal.error_order)


@pytest.mark.gpu
@on_gpu
def test_kernels_match_reference_on_cuda() -> None:
    assert launchers.load("step_control", torch.device("cuda", 0)) is not None
    for case, make in CASES.items():
        proposal = make()
        given = on_cuda(proposal)
        after, again = op.advance(*given), op.advance(*given)
        assert all(torch.equal(one, other) for one, other in zip(after, again, strict=True)), case
        on_cpu = ControlState(*(part.cpu() for part in after))
        assert_matches(on_cpu, advance_reference(*proposal), clearly_decided(proposal), case)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("width", [8, 4096], ids=["one-launch", "two-launches"])
def test_captured_in_a_cuda_graph(width: int) -> None:
    """A graph recorded once decides on whatever is in its inputs later, without the host waiting."""
    first, second = (on_cuda(random_proposal(seed, 33, (width,), torch.float32)) for seed in (3, 33))
    op.advance(*first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        after = op.advance(*first)
    inputs = [(*proposal.state, *proposal[2:6]) for proposal in (first, second)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for target, source in zip(*inputs, strict=True):
            target.copy_(source)
        graph.replay()
        expected = op.advance(*second._replace(control=first.control, error_order=first.error_order))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, expected, strict=True))
