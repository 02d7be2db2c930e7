"""The fused runner: rollouts of MLP fields in one call (`mfd_fast.ops.mlp_rollout`).

A field's program is traced once from its ``mlp_program`` method and kept as long as its network lives. It is traced
anew when a layer was exchanged; weights are read from where they are at each call, so whatever changes them is seen.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from mfd_fast.fields import time_range_of
from mfd_fast.guidance import Guidance, Guided, complete_negative, guide
from mfd_fast.ops.mlp_program import DescribesItself, NotAnMLP, Program, ProgramBuilder
from mfd_fast.ops.mlp_rollout import MLPRollout, Outcome, check_readable, mlp_rollouts, why_unavailable
from mfd_fast.rollout.checks import check_condition
from mfd_fast.rollout.compiled import remembered
from mfd_fast.rollout.execute import RolloutOptions, execute
from mfd_fast.rollout.plan import make_plan
from mfd_fast.rollout.problem import Problem
from mfd_fast.rollout.result import Rollout, SuccessfulRollout
from mfd_fast.solvers import TorchdiffeqSolver, get_solver
from mfd_fast.types import Condition, RolloutStats, VelocityField

SOLVERS = ("euler", "ab2")


class _Part(NamedTuple):
    """A module of a network as it was when its program was traced."""

    module: "ref[nn.Module]"
    """Weak: the network is the key under which this is kept."""
    kind: type[nn.Module]
    attributes: dict[str, Any]
    """The module's own, live."""
    children: list[nn.Module | None]


class _Traced(NamedTuple):
    program: Program
    parts: list[_Part]


_TRACED: "WeakKeyDictionary[nn.Module, dict[object, _Traced]]" = WeakKeyDictionary()


class PreparedFused:
    """A problem that is ready for one call; NotAnMLP says why it cannot be."""

    def __init__(self, problem: Problem, options: RolloutOptions) -> None:
        why = why_unavailable(problem.x.device)
        if why is not None:
            raise NotAnMLP(why)
        _check_options(problem, options)
        self.shape = problem.x.shape
        self.rollout = _prepare(problem, options)
        check_readable(self.rollout)

    def __call__(self, problem: Problem, options: RolloutOptions) -> Rollout:
        """The finished rollout."""
        try:
            return run_fused([self])[0]
        except IndexError:
            return execute(problem, options)  # the network says which condition has no such row


def run_fused(prepared: Sequence[PreparedFused]) -> list[Rollout]:
    """Integrate all in one call."""
    outcomes = mlp_rollouts([one.rollout for one in prepared])
    return [_finished(one.shape, outcome) for one, outcome in zip(prepared, outcomes, strict=True)]


class Quick(NamedTuple):
    """Outcome of a rollout that was checked and integrated in one call, with all rows successful."""

    outcome: Outcome
    shape: torch.Size
    cost: int
    reason: str

    def mean_velocity(self) -> Tensor:
        """In the shape of the state."""
        u = self.outcome.mean_velocity
        return u if len(self.shape) == 2 else u.view(self.shape)

    def displacement(self) -> Tensor:
        """In the shape of the state."""
        return self.outcome.displacement.view(self.shape)

    def stats(self) -> RolloutStats:
        """What `mfd_fast.mean_velocity` returns as statistics; few callers want them."""
        calls, steps, status = self.outcome.counts.unbind(0)
        return RolloutStats(calls * self.cost, steps, status, "fused", self.reason, None)


def integrate_quickly(
    field: VelocityField,
    x: Any,
    t: Any,
    r: Any,
    options: RolloutOptions,
    condition: Condition | None,
    guidance: Guidance,
) -> Quick | None:
    """What ``runner="fused"`` gives for the plainest arguments, in a fraction of the time that checking them takes.

    For a small network and batch the checks of `mfd_fast.mean_velocity` take longer than the rollout. Here compiled
    code does them. None for whatever is out of the ordinary, good or bad: the ordinary way then integrates, or says
    what is wrong.
    """
    reason = _reason(field, options)
    if reason is None or not (_is_plain_tensor(x) and _is_plain_tensor(t) and _is_plain_tensor(r)):
        return None
    rows = len(x) if x.dim() > 1 else 0
    if not rows or t.shape != (rows,) or r.shape != (rows,) or x.numel() == 0:
        return None
    if options.max_evaluations is not None or options.max_rows is not None or options.field_dtype is not None:
        return None
    if options.with_gradient or guidance.interval is not None or guidance.every != 1:
        return None
    if options.solver not in SOLVERS or torch.is_autocast_enabled("cpu") or time_range_of(field) is not None:
        return None
    try:
        given = check_condition("condition", condition, x)
        negative = guidance.negative_condition
        negative = None if negative is None else check_condition("negative_condition", negative, x)
        guided, arguments, cost = guide(field, given, negative, guidance.scale, x)
        inner, conditions, scale = _groups(guided, arguments)
        flat = x if x.dim() == 2 else x.detach().view(rows, -1)
        program = _program_for(inner, flat.shape[1], conditions)
        two_step = options.solver == "ab2"
        rollout = MLPRollout(program, flat, t, r, None, None, options.fixed, None, two_step, conditions, scale)
        (outcome,) = mlp_rollouts([rollout])
    except (NotAnMLP, IndexError, TypeError, ValueError):
        return None
    return Quick(outcome, x.shape, cost, reason) if outcome.succeeded else None


def _reason(field: VelocityField, options: RolloutOptions) -> str | None:
    """Why the fused runner comes first, or None if it does not."""
    if options.runner == "fused":
        return "asked for"
    measured = remembered(field) if options.runner == "auto" else None
    return f"auto: {measured.words}" if measured is not None and measured.runners[0] == "fused" else None


def _is_plain_tensor(value: Any) -> bool:
    return (
        type(value) is Tensor
        and value.is_cpu
        and value.dtype is torch.float32
        and value.is_contiguous()
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def _check_options(problem: Problem, options: RolloutOptions) -> None:
    if options.with_gradient:
        raise NotAnMLP("it has no gradient; take runner='eager' with differentiable=True")
    if options.solver not in SOLVERS:
        raise NotAnMLP(f"its solvers are {' and '.join(SOLVERS)}, got solver={options.solver!r}")
    if options.max_rows is not None:
        raise NotAnMLP(f"it computes 16 rows at a time, got max_rows={options.max_rows}")
    if problem.x.dtype != torch.float32 or problem.field_dtype != torch.float32:
        raise NotAnMLP(f"it computes in float32, got x in {problem.x.dtype}, field_dtype={problem.field_dtype}")
    if torch._C._functorch.is_functorch_wrapped_tensor(problem.x) or torch.is_autocast_enabled(problem.x.device.type):
        raise NotAnMLP("it runs neither inside torch.func transforms nor under autocast")


def _prepare(problem: Problem, options: RolloutOptions) -> MLPRollout:
    field, conditions, scale = _groups(problem.field, problem.condition)
    x = problem.x.detach().flatten(1).contiguous()
    program = _program_for(field, x.shape[1], conditions)
    most = _most_steps(problem, options)
    t, r, host_t, host_r = (part.detach().contiguous() for part in problem.times)
    return MLPRollout(program, x, t, r, host_t, host_r, options.fixed, most, options.solver == "ab2", conditions, scale)


def _program_for(field: VelocityField, features: int, conditions: Sequence[Condition]) -> Program:
    """The program of a field, which must know all conditions."""
    program = program_of(field, features)
    for condition in conditions:
        if condition and not condition.keys() <= (names := {given.name for given in program.inputs}):
            known = ", ".join(sorted(names)) or "none"
            raise NotAnMLP(f"the network has the conditions: {known}; got {', '.join(map(str, condition))}")
    return program


def _most_steps(problem: Problem, options: RolloutOptions) -> int | None:
    """Steps that the budget allows a row; None without one. ValueError if it is not a single one."""
    planned = options.fixed.count(problem.times.host_t, problem.times.host_r)  # ValueError if there are too many
    if options.max_evaluations is None:
        return None
    budget = options.max_evaluations // problem.cost
    if budget == 0:
        raise NotAnMLP(f"max_evaluations={options.max_evaluations} does not allow a single guided evaluation")
    solver = get_solver(options.solver)
    assert not isinstance(solver, TorchdiffeqSolver)
    return int(make_plan(planned, solver, budget).run.max())


def program_of(field: VelocityField, features: int) -> Program:
    """The program of a field for states of so many features; NotAnMLP if it has none, with the reason."""
    network: Any = field if isinstance(field, nn.Module) else getattr(field, "field", None)
    if not hasattr(field, "mlp_program") or not isinstance(network, nn.Module):
        raise NotAnMLP(
            f"the field is a {type(field).__name__} without a method mlp_program; an nn.Sequential of Linears and "
            "activations gets one from mfd_fast.fields.sequential_mlp"
        )
    known = _TRACED.setdefault(network, {})
    key = features if field is network else (type(field), features, *_settings(field))
    traced = known.get(key)
    if traced is None or not _are_as_they_were(traced.parts):
        traced = known[key] = _Traced(_trace(field, features), [_part(module) for module in network.modules()])
        _check_parts(traced.parts)
    return traced.program


def _settings(wrapper: Any) -> tuple[object, ...]:
    return tuple(value for name, value in vars(wrapper).items() if name != "field")


def _trace(field: DescribesItself, features: int) -> Program:
    classes = type(field).__mro__
    for kind in classes:
        if "mlp_program" in vars(kind):
            break
        if "forward" in vars(kind):
            raise NotAnMLP(f"{kind.__name__} has a forward of its own, but no mlp_program that follows it")
    build = ProgramBuilder(features)
    return build.program(field.mlp_program(build))


def _part(module: nn.Module) -> _Part:
    return _Part(ref(module), type(module), vars(module), list(module._modules.values()))


def _check_parts(parts: list[_Part]) -> None:
    for part in parts:
        if not _are_as_they_were([part]):
            raise NotAnMLP(f"a {part.kind.__name__} has hooks or a forward of its own")


def _are_as_they_were(parts: list[_Part]) -> bool:
    """Whether calling the modules still is running the forward of their class on the same children, nothing else."""
    # Written out, because it is part of every call and small rollouts take as long.
    for module, kind, own, children in parts:
        if (
            type(module()) is not kind
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or "forward" in own
            or (children and list(own["_modules"].values()) != children)
        ):
            return False
    return True


def _groups(field: VelocityField, condition: Condition) -> tuple[VelocityField, tuple[Condition, ...], Tensor | None]:
    """The field without its guidance, the conditions of its groups of rows, and the scale."""
    if not isinstance(field, Guided):
        return field, (condition,), None
    negative = complete_negative(condition["condition"], condition["negative_condition"])
    return field.field, (condition["condition"], negative), condition["guidance_scale"].detach().contiguous()


def _finished(shape: torch.Size, outcome: Outcome) -> Rollout:
    displacement, mean_velocity = outcome[:2]
    if len(shape) != 2:
        displacement, mean_velocity = displacement.view(shape), mean_velocity.view(shape)
    calls, steps, status = outcome.counts.unbind(0)
    kind = SuccessfulRollout if outcome.succeeded else Rollout
    return kind(displacement, mean_velocity, calls, steps, status)
