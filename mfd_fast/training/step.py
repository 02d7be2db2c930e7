"""Updates through compiled networks: forward and backward of the role that is trained.

Only the network is compiled; the loss around it is a handful of operations. The compiled copy holds the very parameters
of the role, so gradients arrive where the optimiser looks for them and no weight can be stale. On the CPU float32
Linears go through the faster of the two matrix products, in both directions (`mfd_fast.ops.linear`).
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mfd_fast.module_copies import copied_module
from mfd_fast.rollout.compiled import NotCompilable, own_code, use_onednn, with_copies
from mfd_fast.rows import first_rows
from mfd_fast.student import Student
from mfd_fast.types import VelocityField

WORTH_COMPILING = {"cpu": 1e14, "cuda": 1e17}
"""Floating-point operations of all updates from which on "auto" compiles: about a quarter of an hour of one core, or
some minutes of a large GPU. Compiling takes one to three minutes and saves about a third (docs/engine.md)."""


class CannotCompile(Exception):
    """Why updates run eager."""


class Updates(NamedTuple):
    """How the updates of a run are computed."""

    auxiliary: VelocityField
    """What the auxiliary's loss is computed with."""
    student: VelocityField
    """What the student's loss is computed with."""
    compiled: bool


class Work(NamedTuple):
    """What the updates of a run compute."""

    updates: int
    x: Tensor
    """``[B, ...]``, anything of the shape of one backward pass."""
    condition: Mapping[str, Tensor]
    """Its condition."""

    def operations(self, field: VelocityField) -> float:
        """Floating-point operations of all updates of this process, a backward pass counted as two forward passes."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            field(self.x[:1], torch.ones(1, device=self.x.device), **first_rows(self.condition, 1))
        return float(3 * counter.get_total_flops() * len(self.x) * self.updates)


def make_updates(
    setting: str,
    auxiliary: VelocityField,
    student: Student,
    parameters: Mapping[str, list[nn.Parameter]],
    work: Work,
    say: Callable[[str], None],
) -> Updates:
    """Both trained roles compiled, or as they are.

    Args:
        setting: "on", "off", or "auto" for where it is worth the time.
        auxiliary: the auxiliary.
        student: what generates the samples of the student's updates.
        parameters: what is trained, by role.
        work: what there is to compute.
        say: is told what happens.

    Raises:
        ValueError: "on" where it is not possible.
    """
    eager = Updates(auxiliary, student.field, False)
    if setting == "off" or (setting == "auto" and not _worth_compiling(auxiliary, work)):
        return eager
    say("compiling the updates, which takes a minute or more")
    begin = time.monotonic()
    try:
        updates = Updates(trained_copy(auxiliary), trained_copy(student.field), True)
        try_out(partial(_velocity, updates.auxiliary, work), parameters["auxiliary"])
        try_out(partial(_samples, replace(student, field=updates.student), work), parameters["student"])
    except CannotCompile as why:
        if setting == "on":
            raise ValueError(f"distill.compile is on but not possible: {why}") from why
        say(f"updates run eager: {why}")
        return eager
    say(f"compiled in {time.monotonic() - begin:.0f} s")
    return updates


def _worth_compiling(field: VelocityField, work: Work) -> bool:
    return work.operations(field) >= WORTH_COMPILING.get(work.x.device.type, math.inf)


def trained_copy(field: VelocityField) -> VelocityField:
    """``field`` with its network compiled, gradients included.

    Every batch must have the same shape; another one is another graph.

    Raises:
        CannotCompile: the field is no module and no wrapper of one, or its module cannot be copied.
    """
    try:
        return with_copies(field, _compiled)
    except (NotCompilable, TypeError) as error:
        raise CannotCompile(str(error)) from error


def _compiled(module: nn.Module) -> object:
    same = {id(value): value for value in (*module.parameters(), *module.buffers())}
    copied = copied_module(module, dict(same))
    use_onednn(copied)
    return torch.compile(own_code(copied), dynamic=False)


def _velocity(field: VelocityField, work: Work) -> Tensor:
    rows = len(work.x)
    velocity: Tensor = field(work.x, torch.ones(rows, device=work.x.device), **first_rows(work.condition, rows))
    return velocity


def _samples(student: Student, work: Work) -> Tensor:
    """All steps: the first starts from a constant and the others do not, which are two graphs."""
    return student.generate(work.x, work.condition, with_gradient=True, fresh=lambda: torch.zeros_like(work.x))


def try_out(compute: Callable[[], Tensor], parameters: list[nn.Parameter]) -> None:
    """Compile what ``compute`` does with a `trained_copy`, forward and backward; no gradient is kept.

    Raises:
        CannotCompile: the compiler failed.
    """
    # Imported here because it takes longer than the rest of the package together.
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        torch.autograd.grad(compute().float().square().mean(), parameters, allow_unused=True)
    except (TorchDynamoException, InductorError) as error:
        raise CannotCompile(f"torch.compile failed: {str(error).splitlines()[0]}") from error
