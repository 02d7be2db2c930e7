"""Fused MLP rollouts against their definition: the C++ core with every width of vectors, Triton in its interpreter."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mfd_fast import native
from mfd_fast.fields import sequential_mlp
from mfd_fast.models import build_model
from mfd_fast.ops import mlp_rollout as op
from mfd_fast.ops.mlp_program import ACTIVATIONS, NotAnMLP, Program, ProgramBuilder, evaluate_program
from mfd_fast.ops.mlp_rollout import MLPRollout, rollout_reference
from mfd_fast.step_control import FixedSteps

LAYERS = {
    "identity": nn.Identity,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
}


def traced(field: object, features: int) -> Program:
    build = ProgramBuilder(features)
    return build.program(field.mlp_program(build))  # type: ignore[attr-defined]


def perturbed(module: nn.Module, scale: float) -> nn.Module:
    for parameter in module.requires_grad_(False).parameters():
        parameter.add_(scale * torch.randn_like(parameter))
    return module


def package_mlp(width: int = 40, depth: int = 1, block_width: int = 17) -> nn.Module:
    """Odd widths everywhere."""
    options = {"width": width, "depth": depth, "block_width": block_width, "time_features": 8, "condition_width": 9}
    return perturbed(build_model("mlp", (1, 2, 3), 3, **options), 0.1)


def sequential(features: int, widths: list[int], activation: str, time: str = "append") -> sequential_mlp:
    sizes = [features + 1, *widths, features]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, bias=len(layers) != 2), LAYERS[activation]()]
    return sequential_mlp(nn.Sequential(*layers[:-1]).requires_grad_(False), time)


def intervals(rows: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """States and intervals in both directions, one of them empty."""
    x, t, r = torch.randn(rows, features), torch.rand(rows), torch.rand(rows)
    if rows > 3:
        r[3] = t[3]
    return x, t, r


def rollout_of(
    field: object,
    rows: int,
    features: int,
    *,
    two_step: bool,
    guided: str = "",
    most: int | None = None,
    h: float = 0.1,
) -> MLPRollout:
    x, t, r = intervals(rows, features)
    program = traced(field, features)
    labelled = bool(program.inputs)
    label = torch.randint(0, 4, (rows,)) if labelled else None
    conditions: tuple[dict[str, Tensor | None], ...] = ({"label": label} if labelled else {},)
    scale = None
    if guided:
        conditions = (*conditions, {"label": None})
        scale = torch.tensor([4.5]) if guided == "one" else 4 * torch.rand(rows)
    host = (t.double(), r.double())
    return MLPRollout(program, x, t, r, *host, FixedSteps(h), most, two_step, conditions, scale)


def case(seed: int, make: Callable[[], list[MLPRollout]]) -> Callable[[], list[MLPRollout]]:
    def seeded() -> list[MLPRollout]:
        torch.manual_seed(seed)
        return make()

    return seeded


CASES: dict[str, Callable[[], list[MLPRollout]]] = {
    "euler": case(0, lambda: [rollout_of(package_mlp(), 3, 6, two_step=False)]),
    "two-step, guided": case(1, lambda: [rollout_of(package_mlp(), 11, 6, two_step=True, guided="one")]),
    "scales by row, budget": case(
        2, lambda: [rollout_of(package_mlp(16), 5, 6, two_step=False, guided="rows", most=2)]
    ),
    "teacher and auxiliary": case(
        3,
        lambda: [
            rollout_of(package_mlp(), 9, 6, two_step=False, guided="one", h=0.3),
            rollout_of(sequential(6, [33], "tanh"), 19, 6, two_step=True, h=0.3),
        ],
    ),
    "empty": case(4, lambda: [rollout_of(package_mlp(), 0, 6, two_step=True)]),
    "empty, scales by row": case(4, lambda: [rollout_of(package_mlp(), 0, 6, two_step=True, guided="rows")]),
    **{
        f"sequential, {name}": case(
            5 + number,
            lambda name=name: [
                rollout_of(sequential(2, [20, 7], name, "prepend" if name == "relu" else "append"), 4, 2, two_step=True)
            ],
        )
        for number, name in enumerate(ACTIVATIONS)
    },
    "wide samples": case(20, lambda: [rollout_of(sequential(70, [5], "silu"), 2, 70, two_step=False, h=0.5)]),
}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Float32 rounding of a few dozen steps."""
    assert actual.shape == expected.shape
    if len(expected):
        assert float((actual - expected).norm()) <= 3e-6 * float(expected.norm())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_core_matches_reference(name: str, lanes: int) -> None:
    core = native.core()
    assert core is not None
    if lanes not in core.MLP_LANES:
        pytest.skip(f"this processor has no vectors of {lanes} floats")
    rollouts = CASES[name]()
    for actual, expected in zip(op._run_core(rollouts, lanes), map(rollout_reference, rollouts), strict=True):
        assert_close(actual.mean_velocity, expected.mean_velocity)
        assert_close(actual.displacement, expected.displacement)
        assert torch.equal(actual.counts, expected.counts)
    assert actual.succeeded == all(bool(rollout_reference(one).succeeded) for one in rollouts)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 35),
    features=st.integers(1, 40),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    activation=st.sampled_from(sorted(LAYERS)),
    time=st.sampled_from(["append", "prepend"]),
    labelled=st.booleans(),
    two_step=st.booleans(),
    guided=st.sampled_from(["", "one", "rows"]),
    most=st.sampled_from([None, 1, 3, 8]),
    h=st.sampled_from([0.06, 0.11, 1.5]),
    lanes=st.sampled_from([0, 4, 8, 16]),
    threads=st.sampled_from([1, 2]),
)
def test_core_matches_reference_for_any_sizes(
    seed: int,
    rows: int,
    features: int,
    widths: list[int],
    activation: str,
    time: str,
    labelled: bool,
    two_step: bool,
    guided: str,
    most: int | None,
    h: float,
    lanes: int,
    threads: int,
) -> None:
    core = native.core()
    assert core is not None
    torch.manual_seed(seed)
    if labelled:  # the package's network has six features
        # Normalising two features that are nearly equal makes much of the reference's own rounding.
        field: object = package_mlp(max(widths[0], 4), len(widths), widths[-1])
        rollout = rollout_of(field, rows, 6, two_step=two_step, guided=guided, most=most, h=h)
    else:
        field = sequential(features, widths, activation, time)
        rollout = rollout_of(field, rows, features, two_step=two_step, most=most, h=h)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (actual,) = op._run_core([rollout], lanes if lanes in core.MLP_LANES else 0)
    finally:
        torch.set_num_threads(before)
    expected = rollout_reference(rollout)
    assert torch.equal(actual.counts, expected.counts)
    assert_close(actual.displacement, expected.displacement)
    assert_close(actual.mean_velocity, expected.mean_velocity)


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 16, 17, 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_core_blocks_of_rows(rows: int, threads: int) -> None:
    """Every remainder of the register tiles, several blocks, time evaluated for several steps at once."""
    torch.manual_seed(rows)
    rollout = rollout_of(package_mlp(width=150, depth=2, block_width=70), rows, 6, two_step=True, h=0.02)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (actual,) = op._run_core([rollout])
    finally:
        torch.set_num_threads(before)
    assert_close(actual.mean_velocity, rollout_reference(rollout).mean_velocity)


def test_steps_are_counted_from_what_is_given() -> None:
    """0.3 in float32 is more than 0.3: three steps of 0.1 in float64, four from the float32 number."""
    torch.manual_seed(0)
    rollout = rollout_of(package_mlp(), 1, 6, two_step=False)._replace(t=torch.zeros(1), r=torch.full((1,), 0.3 + 1e-6))
    exact = rollout._replace(host_t=torch.zeros(1).double(), host_r=torch.full((1,), 0.3).double())
    assert int(op._run_core([exact])[0].counts[1, 0]) == 3
    plain = rollout._replace(host_t=None, host_r=None)
    assert int(op._run_core([plain])[0].counts[1, 0]) == 4
    assert torch.equal(op._run_core([plain])[0].counts, rollout_reference(plain).counts)
    for name in ("x", "t", "r"):
        bad = getattr(plain, name).clone()
        bad.view(-1)[-1] = float("inf")
        with pytest.raises(ValueError, match="must be finite"):
            op._run_core([plain._replace(**{name: bad})])


def test_core_refuses_what_makes_no_sense() -> None:
    torch.manual_seed(0)
    rollout = rollout_of(package_mlp(), 4, 6, two_step=False)
    program = rollout.program
    outside = program.ops[-1]._replace(src=len(program.widths))
    narrow = (*program.widths[:-1], 1)
    for wrong, message in (
        (
            Program(program.widths, (*program.ops[:-1], outside), program.time_ops, program.output, program.inputs),
            "slot",
        ),
        (Program(narrow, program.ops, program.time_ops, program.output, program.inputs), "width"),
        (Program(program.widths, program.ops, program.time_ops, 0, program.inputs), "output"),
        (Program(program.widths, program.ops, len(program.ops), 5, program.inputs), "output"),
    ):
        with pytest.raises(ValueError, match=message):
            op._run_core([rollout._replace(program=wrong)])
    late = program.ops[program.time_ops]
    early = Program(program.widths, (late, *program.ops[1:]), program.time_ops, program.output, program.inputs)
    with pytest.raises(ValueError, match="slot"):
        op._run_core([rollout._replace(program=early)])
    with pytest.raises(IndexError):
        op._run_core([rollout._replace(conditions=({"label": torch.full((4,), 4)},))])
    with pytest.raises(ValueError, match="too many steps"):
        op._run_core([rollout._replace(control=FixedSteps(1e-9))])
    with pytest.raises(ValueError, match="vectors of 5"):
        op._run_core([rollout], lanes=5)


def test_non_finite_rows_are_marked() -> None:
    torch.manual_seed(0)
    field = package_mlp()
    rollout = rollout_of(field, 4, 6, two_step=False)
    field.condition.label.weight[1] = float("nan")  # type: ignore[union-attr,operator]
    rollout = rollout._replace(conditions=({"label": torch.tensor([0, 1, 2, 1])},))
    (actual,) = op._run_core([rollout])
    assert actual.counts[2].tolist() == [0, 3, 0, 3] == rollout_reference(rollout).counts[2].tolist()
    assert actual.succeeded is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.double(), "float32"),
        (lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(3, 3))), "shape"),
        (lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.t().contiguous().t())), "contiguous"),
    ],
    ids=["dtype", "shape", "layout"],
)
def test_weights_that_compiled_code_cannot_read(change: Callable[[nn.Module], object], message: str) -> None:
    torch.manual_seed(0)
    field = sequential(2, [5], "silu")
    rollout = rollout_of(field, 3, 2, two_step=False)
    change(field.field[0])
    with pytest.raises(NotAnMLP, match=message):
        op.mlp_rollouts([rollout])


def test_what_32_bits_cannot_place_is_refused() -> None:
    builder = ProgramBuilder(2)
    program = builder.program(sequential(2, [5], "silu").mlp_program(builder))
    op.check_places(program, 2**31 - 1)
    with pytest.raises(NotAnMLP, match="too large for the kernel's 32-bit places"):
        op.check_places(program, 2**31)
    wide = Program((2, 1, 3, *(2**16 for _ in program.widths[3:])), program.ops, program.time_ops, 3, program.inputs)
    assert max(wide.widths[one.src] * wide.widths[one.dst] for one in wide.ops) >= 2**31
    with pytest.raises(NotAnMLP, match="too large for the kernel's 32-bit places"):
        op.check_places(wide, 0)


def test_program_is_the_forward_of_the_network() -> None:
    torch.manual_seed(0)
    network = package_mlp(depth=3)
    x, t, _ = intervals(7, 6)
    for label in (torch.randint(0, 4, (7,)), torch.tensor([2]), None):
        velocity = network(x.view(7, 1, 2, 3), t, label=label).flatten(1)
        assert_close(evaluate_program(traced(network, 6), x, t, {"label": label}), velocity)


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[..., dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return interpret("interpret_mlp_rollout.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernel_matches_reference(interpreted: dict[str, np.ndarray], name: str) -> None:
    for number, rollout in enumerate(CASES[name]()):
        expected = rollout_reference(rollout)
        for part in ("mean_velocity", "displacement"):
            assert_close(torch.from_numpy(interpreted[f"{name}/{number}/{part}"]), getattr(expected, part))
        counts = torch.from_numpy(interpreted[f"{name}/{number}/counts"])
        assert torch.equal(counts, expected.counts)
    assert interpreted[f"{name}/intact"]
