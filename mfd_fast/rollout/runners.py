"""Who executes a rollout: the definition, that loop around a compiled copy, one fused call, or recorded evaluations.

`PREPARE` is the list of runners; `choose_runner` decides between them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from mfd_fast.ops.mlp_program import NotAnMLP
from mfd_fast.ops.mlp_rollout import why_unavailable
from mfd_fast.rollout.captured import NotCapturable, prepare_captured, why_not_captured
from mfd_fast.rollout.compiled import NotCompilable, compiled_field, remembered
from mfd_fast.rollout.execute import RolloutOptions, execute
from mfd_fast.rollout.fused import PreparedFused, run_fused
from mfd_fast.rollout.problem import Problem
from mfd_fast.rollout.result import Rollout


class NotPossible(Exception):
    """Why a runner cannot execute a problem."""


class Choice(NamedTuple):
    """A runner with the reason for it."""

    problem: Problem
    runner: str
    reason: str
    run: Callable[[Problem, RolloutOptions], Rollout] = execute


def choose_runner(problem: Problem, options: RolloutOptions) -> Choice:
    """The problem as the runner of ``options`` executes it.

    ``auto`` compiles nothing by itself: it takes what `mfd_fast.warmup` has found to be fastest for the field, or what
    comes next where that is not possible for this call.

    Raises:
        ValueError: a runner was asked for by name where it is not possible.
    """
    if options.runner != "auto":
        try:
            return PREPARE[options.runner](problem, options, "asked for")
        except NotPossible as why:
            raise ValueError(f"runner={options.runner!r} is not possible: {why}") from why
    measured = remembered(problem.field)
    if measured is None:
        return Choice(problem, "eager", "auto: mfd_fast.warmup has not found anything faster for this field")
    reason = f"auto: {measured.words}"
    for runner in measured.runners:
        try:
            return PREPARE[runner](problem, options, reason)
        except NotPossible as why:  # the module was warmed up, but not inside this wrapper or for this solver
            reason = f"auto: {why}"
    return Choice(problem, "eager", reason)


def choose_pair(
    first: Problem, first_options: RolloutOptions, second: Problem, second_options: RolloutOptions
) -> tuple[Choice, Choice]:
    """The runners of two rollouts; where both are fused they are one call."""
    choices = choose_runner(first, first_options), choose_runner(second, second_options)
    prepared = [choice.run for choice in choices if isinstance(choice.run, PreparedFused)]
    if len(prepared) < 2 or not len(first.x):
        return choices
    try:
        one, other = run_fused(prepared)
    except IndexError:  # one after the other, which says what has no such row
        return choices
    return choices[0]._replace(run=lambda *_: one), choices[1]._replace(run=lambda *_: other)


def _eager(problem: Problem, _: RolloutOptions, reason: str) -> Choice:
    return Choice(problem, "eager", reason)


def _compiled(problem: Problem, options: RolloutOptions, reason: str) -> Choice:
    if options.with_gradient:
        raise NotPossible("compiled copies have no gradient")
    try:
        return Choice(problem._replace(field=compiled_field(problem.field)), "compiled", reason)
    except NotCompilable as why:
        raise NotPossible(str(why)) from why


def _fused(problem: Problem, options: RolloutOptions, reason: str) -> Choice:
    try:
        return Choice(problem, "fused", reason, PreparedFused(problem, options))
    except NotAnMLP as why:
        raise NotPossible(str(why)) from why


def _captured(problem: Problem, options: RolloutOptions, reason: str) -> Choice:
    try:
        return Choice(problem, "captured", reason, prepare_captured(problem, options).run)
    except NotCapturable as why:
        raise NotPossible(str(why)) from why


PREPARE: dict[str, Callable[[Problem, RolloutOptions, str], Choice]] = {
    "eager": _eager,
    "compiled": _compiled,
    "fused": _fused,
    "captured": _captured,
}
"""What makes a problem ready for each runner, given the reason for it; NotPossible where it cannot."""

WHY_NOT: dict[str, Callable[[torch.device], str | None]] = {
    "fused": why_unavailable,
    "captured": why_not_captured,
}
"""Why a runner can execute nothing on a device, or None; runners that are not here run on all."""
