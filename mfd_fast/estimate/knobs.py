"""What saves memory, cheapest first; the estimate and the message of a run without memory read the same list."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from mfd_fast.estimate.plan import Plan

SHARED_BITS = 32
"""DeepSpeed flattens weights, which moments of 8 bits do not follow."""
Change = Callable[[Plan], Plan | None]


class Knob(NamedTuple):
    """One way to need less memory."""

    words: str
    """What to set."""
    price: str
    """What it costs."""
    change: Change
    """The plan with it, or None where it changes nothing."""


def _float_teacher(plan: Plan) -> Plan | None:
    return replace(plan, low_teacher=False) if plan.low_teacher else None


def _fewer_sampled(plan: Plan) -> Plan | None:
    return replace(plan, sample_rows=plan.rows) if plan.auxiliary and plan.sample_rows > plan.rows else None


def _fewer_rows(plan: Plan) -> Plan | None:
    least = 1 + plan.guided + (plan.auxiliary == "lora")
    return replace(plan, max_rows=least) if plan.rows > 1 and (plan.max_rows or 10**9) > least else None


def _accumulate(plan: Plan) -> Plan | None:
    return replace(plan, rows=plan.rows // 2, accumulation=2 * plan.accumulation) if plan.rows > 1 else None


def _recompute_steps(plan: Plan) -> Plan | None:
    return replace(plan, recompute_steps=True) if plan.grad_steps > 1 and not plan.recompute_steps else None


def _recompute_blocks(plan: Plan) -> Plan | None:
    return None if plan.recompute_blocks else replace(plan, recompute_blocks=True)


def _small_moments(plan: Plan) -> Plan | None:
    return replace(plan, optimizer_bits=8) if plan.optimizer_bits == 32 and not plan.zero else None


def _half(plan: Plan) -> Plan | None:
    return replace(plan, precision="bfloat16") if plan.precision == "float32" else None


def _shared_gradients(plan: Plan) -> Plan | None:
    # Stage 3 is no knob: rollouts need whole weights, and their replica costs more than sharing out saves.
    useful = plan.full_roles and plan.gpus > 1 and plan.zero < 2
    return replace(plan, zero=2, optimizer_bits=SHARED_BITS) if useful else None


def _offload(plan: Plan) -> Plan | None:
    useful = plan.full_roles and not plan.offload
    return replace(plan, zero=plan.zero or 2, offload=True, optimizer_bits=SHARED_BITS) if useful else None


def _more_gpus(plan: Plan) -> Plan | None:
    if not plan.full_roles:
        return None
    # The batch of all processes stays: each computes half as many rows, or half as often.
    rows = plan.rows // 2 if plan.rows > 1 else plan.rows
    return replace(plan, gpus=2 * plan.gpus, zero=max(2, plan.zero), optimizer_bits=SHARED_BITS, rows=rows)


def _low_rank(plan: Plan) -> Plan | None:
    if not plan.full_roles:
        return None
    return replace(plan, auxiliary=plan.auxiliary and "lora", student="lora", zero=0, offload=False)


KNOBS = (
    Knob("distill.sample_rows = rows of one backward pass", "nothing but more calls", _fewer_sampled),
    Knob("distill.rollout.max_rows = rows of one sample", "nothing but more calls", _fewer_rows),
    Knob("distill.teacher_weights = float", "the speed of products of 8 bits", _float_teacher),
    Knob("distill.accumulation twice as large", "smaller products", _accumulate),
    Knob("distill.recompute_steps = true", "one more forward pass of the student", _recompute_steps),
    Knob("distill.recompute_blocks = true", "one more forward pass in each update", _recompute_blocks),
    Knob("moments of 8 bits (adamw8bit)", "rounded moments", _small_moments),
    Knob("distill.precision = bfloat16", "rounded products", _half),
    Knob("distill.zero_stage = 2", "messages in each update", _shared_gradients),
    Knob("states offloaded to the host's memory", "transfers in each update", _offload),
    Knob("twice as many GPUs with ZeRO", "GPUs", _more_gpus),
    Knob("distill.roles = lora", "another kind of student and auxiliary", _low_rank),
)
"""Cheapest first: the same numbers, then more work, then other rounding, then more machines, then another method."""


def cheapest(plan: Plan, useful: Callable[[Plan], bool] = lambda changed: True, count: int = 3) -> list[Knob]:
    """The first ``count`` knobs that change this plan and whose plan is ``useful``."""
    found: list[Knob] = []
    for knob in KNOBS:
        changed = knob.change(plan)
        if changed is not None and useful(changed):
            found.append(knob)
    return found[:count]
