"""An estimate put together, as a table and as JSON."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mfd_fast.estimate.duration import Gpu, Work, seconds, work_of
from mfd_fast.estimate.knobs import cheapest
from mfd_fast.estimate.memory import GIB, Memory, memory_of
from mfd_fast.estimate.network import Network
from mfd_fast.estimate.plan import Plan

TIGHT = 0.92
"""Share of the memory above which what an allocator wastes may be too much."""
WORTH = 0.05
"""Share of the memory that a knob must save to be named."""


class Advice(NamedTuple):
    """A knob and what is needed with it."""

    words: str
    price: str
    total: float
    """Bytes with this knob alone."""
    together: float
    """Bytes with this and all knobs before it."""


class Estimate(NamedTuple):
    """What a run needs on one GPU."""

    plan: Plan
    network: Network
    memory: Memory
    limit: float
    """Bytes of the GPU."""
    work: Work | None
    times: dict[str, float]
    """Seconds by the model: of a student update alone, of an auxiliary update, of a student update with its share."""
    advice: list[Advice]
    """The cheapest knobs, where it does not fit."""

    @property
    def fits(self) -> bool:
        """Whether the GPU holds it."""
        return self.memory.total <= self.limit


def estimate(plan: Plan, network: Network, gpu: Gpu, gib: float | None = None) -> Estimate:
    """The estimate of a plan on a GPU with ``gib`` GiB of memory (None: what that GPU has)."""
    limit = (gpu.gib if gib is None else gib) * GIB
    memory, work = memory_of(plan, network), work_of(plan)
    times = {}
    if work is not None:
        passes = {
            "student update": work.rollout_rows + work.student,
            "auxiliary update": work.auxiliary,
            "student update with its auxiliary updates": work.cycle,
        }
        times = {name: seconds(plan, network, gpu, count) for name, count in passes.items() if count}
    advice = [] if memory.total <= limit else advise(plan, network, memory.total)
    return Estimate(plan, network, memory, limit, work, times, advice)


def advise(plan: Plan, network: Network, total: float) -> list[Advice]:
    """The cheapest knobs that save something, with what is needed then."""

    def saves(changed: Plan) -> bool:
        return memory_of(changed, network).total <= (1 - WORTH) * total

    advice, together = [], plan
    for knob in cheapest(plan, saves):
        alone = knob.change(plan)
        together = knob.change(together) or together
        assert alone is not None, "only knobs that change the plan are chosen"
        needed = memory_of(alone, network).total, memory_of(together, network).total
        advice.append(Advice(knob.words, knob.price, *needed))
    return advice


def format_estimate(found: Estimate) -> str:
    """The estimate as aligned text."""
    memory, plan = found.memory, found.plan
    rows = [(term.role, term.what, f"{term.bytes / GIB:8.2f}") for term in memory.terms]
    rows.append(("all", "most at once", f"{memory.total / GIB:8.2f}"))
    adapters = f", {found.network.adapter:,} in each adapter" if "lora" in (plan.auxiliary, plan.student) else ""
    roles = f"auxiliary {plan.auxiliary or 'none'}, student {plan.student}"
    shared = f", ZeRO-{plan.zero}" if plan.zero else ""
    lines = [
        f"{found.network.name}: {found.network.parameters:,} parameters{adapters}",
        f"{roles}; {plan.gpus} GPU(s){shared}{', offload' if plan.offload else ''}, {plan.rows} row(s) in a backward "
        f"pass, {plan.precision}",
        "",
        *_table(("role", "what", "GiB"), rows),
        "",
        "on top of what is always there: "
        + ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.phases.items()),
        _verdict(found),
        *_sharing(found),
        *_advice(found),
        *_times(found),
        f"{found.network.note}." if found.network.note else "",
    ]
    return "\n".join(lines).rstrip()


def _table(head: Sequence[str], rows: list[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [tuple(head), *rows]) for column in range(3)]
    return [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in [tuple(head), *rows]]


def _verdict(found: Estimate) -> str:
    memory, limit = found.memory, found.limit
    most = memory.dominating
    words = "fits, tightly, in" if memory.total > TIGHT * limit else "fits in"
    words = words if found.fits else "does not fit in"
    host = f"; {memory.host / GIB:.1f} GiB in the host's memory for each process" if memory.host else ""
    return (
        f"{words} {limit / GIB:g} GiB: states {memory.states / GIB:.2f}, activations {memory.activations / GIB:.2f}; "
        f"most is {most.what} of {most.role} ({most.bytes / GIB:.2f}){host}"
    )


def _sharing(found: Estimate) -> list[str]:
    """What to know of ZeRO where it does not help."""
    plan = found.plan
    if not plan.zero:
        return []
    if not plan.full_roles:
        return ["ZeRO brings nothing: it shares out whole networks, and these roles are adapters; a run refuses it"]
    without = memory_of(replace(plan, zero=0, offload=False), found.network).total
    if found.memory.total <= (1 - WORTH) * without:
        return []
    return [f"ZeRO-{plan.zero} brings little: without it {without / GIB:.2f} GiB are needed"]


def _advice(found: Estimate) -> list[str]:
    if found.fits:
        return []
    if not found.advice:
        return ["no knob saves enough to be named: it needs a larger GPU or a smaller network"]
    lines = ["cheapest knobs (GiB alone, and with those above it):"]
    for knob in found.advice:
        alone, together = knob.total / GIB, knob.together / GIB
        lines.append(f"  {knob.words}: {alone:.2f}, {together:.2f} (costs {knob.price})")
    last = found.advice[-1].together
    lines.append(f"  all of these {'fit' if last <= found.limit else 'are not enough'}")
    return lines


def _times(found: Estimate) -> list[str]:
    if found.work is None:
        return ["no time: an adaptive solver decides how many evaluations there are"]
    work = found.work
    lines = [
        f"a student update: {work.evaluations:.1f} evaluations a sample, {work.rollout_rows:.0f} network rows of "
        f"rollouts and {work.student:.0f} forward passes of the student"
    ]
    lines += [f"  {name}: {value:.3g} s" for name, value in found.times.items()]
    return [*lines, "  (a roofline model of the GPU, not a measurement; without messages and transfers)"]


def as_json(found: Estimate) -> dict[str, Any]:
    """The estimate in plain values, sizes in bytes and times in seconds."""
    memory = found.memory
    return {
        "network": found.network.name,
        "parameters": found.network.parameters,
        "adapter_parameters": found.network.adapter,
        "terms": [term._asdict() for term in memory.terms],
        "phases": memory.phases,
        "states": memory.states,
        "activations": memory.activations,
        "total": memory.total,
        "host": memory.host,
        "limit": found.limit,
        "fits": found.fits,
        "dominating": memory.dominating._asdict(),
        "sharing": " ".join(_sharing(found)) or None,
        "knobs": [knob._asdict() for knob in found.advice],
        "work": None if found.work is None else found.work._asdict(),
        "seconds": found.times,
    }
