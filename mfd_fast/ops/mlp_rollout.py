"""Rollouts of MLP fields with all steps and all layers in one call: C++ on the CPU, Triton on an NVIDIA GPU.

`rollout_reference` is the definition. A call may hold several rollouts, such as those of teacher and auxiliary.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mfd_fast import native
from mfd_fast.ops import launchers
from mfd_fast.ops.mlp_program import FIELDS, Code, Input, NotAnMLP, Program, evaluate_program
from mfd_fast.types import Status

PLACES = 2**31
"""Places that 32 bits can count."""


class StepCounter(Protocol):
    """How many equal steps a row takes; see `mfd_fast.step_control.FixedSteps`."""

    @property
    def step_size(self) -> float | None: ...
    @property
    def steps(self) -> int | None: ...
    def count(self, t: Tensor, r: Tensor) -> Tensor: ...


class MLPRollout(NamedTuple):
    """One rollout of B rows of F numbers, float32, contiguous and on one device unless it says otherwise."""

    program: Program
    x: Tensor
    """``[B, F]``, the state at t."""
    t: Tensor
    """``[B]``, starts."""
    r: Tensor
    """``[B]``, ends."""
    host_t: Tensor | None
    """``[B]`` float64 on the CPU: the starts from which steps are counted. None (on the CPU alone): ``t`` and ``r`` are
    what steps are counted from, and these and ``x`` are checked: ValueError if they are not finite."""
    host_r: Tensor | None
    """``[B]`` float64 on the CPU, or None."""
    control: StepCounter
    most_steps: int | None
    """Steps after which a row ends early."""
    two_step: bool
    """Adams-Bashforth 2 with a Heun start instead of Euler."""
    conditions: tuple[Mapping[str, Tensor | None], ...]
    """Inputs of the program: of the conditional network and, under guidance, of the negative one."""
    guidance_scale: Tensor | None
    """``[B]`` or ``[1]``; None without guidance."""


class Outcome(NamedTuple):
    """What a rollout gives, in the order of its rows."""

    displacement: Tensor
    """``[B, F]``"""
    mean_velocity: Tensor
    """``[B, F]``; the velocity at t where t == r."""
    counts: Tensor
    """``[3, B]`` int64 on the CPU: evaluations of the field, steps, `Status`."""
    succeeded: bool | None
    """Whether every row did; None where that is not known yet (on a device)."""


def mlp_rollouts(rollouts: Sequence[MLPRollout]) -> list[Outcome]:
    """Integrate in one call.

    Raises:
        NotAnMLP: this machine cannot (`why_unavailable`), or a tensor is not such as `MLPRollout` says.
        IndexError: an index of a condition has no row.
        ValueError: an interval would need too many steps.
    """
    device = rollouts[0].x.device
    why = why_unavailable(device)
    if why is not None:
        raise NotAnMLP(why)
    return _FAST[device.type](rollouts)


def check_readable(rollout: MLPRollout) -> None:
    """NotAnMLP unless the network's tensors and the conditions are such as compiled code reads."""
    rollout.program.addressed(rollout.x.device)
    _inputs(rollout)


def why_unavailable(device: torch.device) -> str | None:
    """Why there are no fused rollouts on ``device``, or None if there are."""
    if device.type == "cpu":
        return None if native.core() is not None else f"the C++ core is off: {native.why_no_core()}"
    if device.type == "cuda":
        loaded = launchers.load("mlp_rollout", device) is not None
        return None if loaded else f"there are no Triton kernels: {launchers.why_off(device) or 'Triton does not work'}"
    return f"there is no code for {device.type}"


def rollout_reference(rollout: MLPRollout) -> Outcome:
    """The definition, in torch: all rows in lock-step, those that are done masked."""
    planned = planned_steps(rollout)
    run = planned if rollout.most_steps is None else planned.clamp(max=rollout.most_steps)
    t, r = rollout.t[:, None], rollout.r[:, None]
    h = (r - t) / planned.clamp(min=1)[:, None]

    def velocity(x: Tensor, step: int) -> Tensor:
        now = (t + step * h).clamp(torch.minimum(t, r), torch.maximum(t, r))[:, 0]
        first, *other = (evaluate_program(rollout.program, x, now, given) for given in rollout.conditions)
        return (
            first if rollout.guidance_scale is None else other[0] + rollout.guidance_scale[:, None] * (first - other[0])
        )

    displacement, previous = torch.zeros_like(rollout.x), None
    initial = velocity(rollout.x, 0)
    for step in range(int(run.max()) if len(run) else 0):
        x = rollout.x + displacement
        v = velocity(x, step)
        if not rollout.two_step:
            increment = h * v
        elif previous is None:
            increment = h * 0.5 * (v + velocity(x + h * v, 1))
        else:
            increment = h * (1.5 * v - 0.5 * previous)
        displacement, previous = torch.where(run[:, None] > step, displacement + increment, displacement), v
    covered = torch.where((run == planned)[:, None], r - t, run[:, None] * h)
    mean = torch.where(run[:, None] == 0, initial, displacement / covered)
    status = torch.where(run < planned, int(Status.MAX_EVALUATIONS), int(Status.SUCCESS))
    status = status.masked_fill(~mean.isfinite().all(1), int(Status.NON_FINITE))
    calls = run + 1 if rollout.two_step else run.clamp(min=1)
    return Outcome(displacement, mean, torch.stack([calls, run, status]), bool((status == Status.SUCCESS).all()))


def planned_steps(rollout: MLPRollout) -> Tensor:
    """``[B]`` int64 on the CPU: the steps of each row, before any limit."""
    t = rollout.t if rollout.host_t is None else rollout.host_t
    r = rollout.r if rollout.host_r is None else rollout.host_r
    return rollout.control.count(t, r)


def _run_core(rollouts: Sequence[MLPRollout], lanes: int = 0) -> list[Outcome]:
    core = native.core()
    assert core is not None
    outcomes, arguments, kept = [], [], []
    for rollout in rollouts:
        outcome = _empty(rollout)
        inputs, tensors = _inputs(rollout)
        scale = rollout.guidance_scale
        arguments.append(
            (
                *(rollout.program.slot_widths, rollout.program.addressed(rollout.x.device)),
                *(rollout.program.time_ops, rollout.program.output, inputs, len(rollout.conditions)),
                *((0, 0) if scale is None else (scale.data_ptr(), int(len(scale) > 1))),
                *(len(rollout.x), rollout.x.data_ptr(), rollout.t.data_ptr(), rollout.r.data_ptr()),
                *(0 if host is None else host.data_ptr() for host in (rollout.host_t, rollout.host_r)),
                *(rollout.control.step_size or 0.0, rollout.control.steps or 0),
                *(-1 if rollout.most_steps is None else rollout.most_steps, rollout.two_step),
                *(part.data_ptr() for part in outcome[:3]),
            )
        )
        outcomes.append(outcome)
        kept.append(tensors)
    succeeded = core.mlp_rollout(arguments, threads=torch.get_num_threads(), lanes=lanes)
    return [outcome._replace(succeeded=succeeded) for outcome in outcomes]


def _empty(rollout: MLPRollout) -> Outcome:
    return Outcome(
        torch.empty_like(rollout.x),
        torch.empty_like(rollout.x),
        torch.empty((3, len(rollout.x)), dtype=torch.int64, device="cpu"),
        None,
    )


def _inputs(rollout: MLPRollout) -> "tuple[array[int], list[Tensor]]":
    """Address and stride of every condition of every group, and the tensors, which must live as long as the call."""
    kept = [_input(given, condition, rollout) for condition in rollout.conditions for given in rollout.program.inputs]
    inputs = array("q")
    for tensor in kept:
        inputs.extend((tensor.data_ptr(), 0 if len(tensor) == 1 else tensor.stride(0)))
    return inputs, kept


def _input(given: Input, condition: Mapping[str, Tensor | None], rollout: MLPRollout) -> Tensor:
    """One condition as compiled code reads it."""
    device, name = rollout.x.device, given.name
    value = condition.get(name)
    if given.rows is None:
        if value is None or value.dtype != torch.float32 or value.dim() != 2 or value.shape[1] != given.width:
            got = "None" if value is None else f"{value.dtype} of shape {list(value.shape)}"
            raise NotAnMLP(f"{name} must be float32 of shape [{len(rollout.x)} or 1, {given.width}], got {got}")
        return value.contiguous()
    if value is None:
        return _default_index(given.default or 0, device)
    if value.dtype not in (torch.int64, torch.int32) or value.dim() != 1:
        raise NotAnMLP(
            f"{name} must be int64 of shape [{len(rollout.x)}] or [1], got {value.dtype}, {list(value.shape)}"
        )
    return value.long().contiguous()


@cache
def _default_index(index: int, device: torch.device) -> Tensor:
    return torch.tensor([index], device=device)


def _run_triton(rollouts: Sequence[MLPRollout]) -> list[Outcome]:
    device = rollouts[0].x.device
    kernels = launchers.load("mlp_rollout", device)
    assert kernels is not None
    table = DeviceTable(kernels, rollouts)
    integers = table.integers()
    on_device = integers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else integers
    kernels.launch_mlp_rollouts(on_device, len(rollouts), table.programs, table.scratch_floats)
    return table.outcomes


class DeviceTable:
    """Rollouts as the table of integers that the kernel reads, and memory for what it writes."""

    def __init__(self, kernels: Any, rollouts: Sequence[MLPRollout]) -> None:
        self._kernels = kernels
        self._headers: list[int] = []
        self._parts: list[Tensor] = []
        self._length: int = kernels.HEADER * len(rollouts)
        self.programs = 0
        """Programs to launch."""
        self.scratch_floats = 0
        """Scratch memory of one program."""
        self.outcomes: list[Outcome] = []
        """What the launch fills."""
        self.kept: list[Tensor] = []
        """Tensors that the table refers to."""
        for rollout in rollouts:
            self._add(rollout)

    def integers(self) -> Tensor:
        """The table, int64 on the CPU: the headers, then what they point to."""
        return torch.cat([_integers(self._headers), *self._parts])

    def _add(self, rollout: MLPRollout) -> None:
        program, block = rollout.program, self._kernels.BLOCK_ROWS
        starts = [block * sum(program.widths[:slot]) for slot in range(len(program.widths) + 1)]
        self.scratch_floats = max(self.scratch_floats, starts[-1] + block * program.widths[0])
        check_places(program, self.scratch_floats)
        planned = planned_steps(rollout)
        run = planned if rollout.most_steps is None else planned.clamp(max=rollout.most_steps)
        outcome, groups, scale = _empty(rollout), len(rollout.conditions), rollout.guidance_scale
        inputs, kept = _inputs(rollout)
        self.kept += kept
        order = torch.argsort(run, descending=True, stable=True)
        header = [
            *(self.programs, len(rollout.x), rollout.x.shape[1], groups),
            *(self._place(_integers(self._operations(rollout, starts))), len(program.ops)),
            *(self._place(_integers(inputs.tolist())), len(program.inputs)),
            *(self._place(torch.cat([order, planned[order], run[order]])), int(rollout.two_step)),
            *(starts[program.output], starts[-1], rollout.x.data_ptr(), rollout.t.data_ptr(), rollout.r.data_ptr()),
            *((0, 0) if scale is None else (scale.data_ptr(), int(len(scale) > 1))),
            *(outcome.displacement.data_ptr(), outcome.mean_velocity.data_ptr()),
        ]
        self._headers += [*header, *[0] * (self._kernels.HEADER - len(header))]
        self.programs += -(-len(rollout.x) // (block // groups))
        calls = run + 1 if rollout.two_step else run.clamp(min=1)
        status = torch.where(run < planned, int(Status.MAX_EVALUATIONS), int(Status.SUCCESS))
        torch.stack([calls, run, status], out=outcome.counts)
        self.outcomes.append(outcome)

    def _operations(self, rollout: MLPRollout, starts: list[int]) -> list[int]:
        widths, table = rollout.program.widths, rollout.program.addressed(rollout.x.device)
        rows = []
        for first in range(0, len(table), FIELDS):
            code, dst, src, other, *rest = table[first : first + FIELDS]
            rows += [code, *(number for slot in (dst, src, other) for number in (starts[slot], widths[slot])), *rest]
        return rows

    def _place(self, integers: Tensor) -> int:
        """Put integers at the end of the table; where they begin."""
        self._parts.append(integers)
        self._length += len(integers)
        return self._length - len(integers)


def _integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def check_places(program: Program, scratch_floats: int) -> None:
    """The kernel counts places in scratch memory, and within one weight, in 32 bits; NotAnMLP where that is too few."""
    weights = [program.widths[op.src] * program.widths[op.dst] for op in program.ops if op.code == Code.LINEAR]
    if max(scratch_floats, *weights, 0) >= PLACES:
        raise NotAnMLP(f"a layer or the features of {max(program.widths)} are too large for the kernel's 32-bit places")


_FAST: dict[str, Callable[[Sequence[MLPRollout]], list[Outcome]]] = {"cpu": _run_core, "cuda": _run_triton}
"""By type of device: what runs there."""
