"""Who executes a rollout: the definition, or the same loop around a compiled copy of the field."""

from typing import NamedTuple

from mfd_fast.rollout.compiled import NotCompilable, compiled_field, remembered
from mfd_fast.rollout.execute import Problem, RolloutOptions


class Choice(NamedTuple):
    """A runner with the reason for it."""

    problem: Problem
    runner: str
    reason: str


def choose_runner(problem: Problem, options: RolloutOptions) -> Choice:
    """The problem as the runner of ``options`` executes it.

    ``auto`` compiles nothing: it uses a compiled copy where `mfd_fast.warmup` has found it faster.

    Raises:
        ValueError: ``runner="compiled"`` was asked for where it cannot be.
    """
    if options.runner == "eager":
        return Choice(problem, "eager", "asked for")
    if options.runner == "auto":
        words = remembered(problem.field)
        if words is None:
            return Choice(problem, "eager", "auto: mfd_fast.warmup has not found anything faster for this field")
        if options.with_gradient:
            return Choice(problem, "eager", "auto: compiled copies have no gradient")
        try:
            return Choice(problem._replace(field=compiled_field(problem.field)), "compiled", f"auto: {words}")
        except NotCompilable as why:  # the module was warmed up, but not inside this wrapper
            return Choice(problem, "eager", f"auto: {why}")
    if options.with_gradient:
        raise ValueError("runner='compiled' has no gradient; take runner='eager' with differentiable=True")
    try:
        return Choice(problem._replace(field=compiled_field(problem.field)), "compiled", "asked for")
    except NotCompilable as why:
        raise ValueError(f"runner='compiled' is not possible: {why}") from why
