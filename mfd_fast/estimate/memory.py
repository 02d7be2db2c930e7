"""States and activations put together: what a GPU must hold, in which phase, and what is the most of it."""

from typing import NamedTuple

from mfd_fast.estimate.network import Network
from mfd_fast.estimate.plan import Plan
from mfd_fast.estimate.states import CUDA_CONTEXT, States, message_bytes, role_states

GIB = 2**30


class Term(NamedTuple):
    """One part of the memory of a GPU."""

    role: str
    what: str
    bytes: float


class Memory(NamedTuple):
    """What one GPU must hold."""

    terms: list[Term]
    """What is there all the time, and then the phase that needs most on top of it."""
    phases: dict[str, float]
    """Bytes of each phase, on top of what is always there."""
    states: float
    """Bytes of weights, gradients and the optimisers' states, teacher included."""
    activations: float
    """Bytes of activations in the phase that needs most."""
    host: float
    """Bytes in the host's memory, for each process."""

    @property
    def total(self) -> float:
        """Bytes of everything in the phase that needs most."""
        return sum(term.bytes for term in self.terms)

    @property
    def dominating(self) -> Term:
        """The largest part."""
        return max(self.terms, key=lambda term: term.bytes)


def memory_of(plan: Plan, network: Network) -> Memory:
    """The memory of one GPU; see docs/estimate.md for each formula."""
    roles: dict[str, States] = {}
    if plan.auxiliary is not None:
        roles["auxiliary"] = role_states(plan, network, plan.auxiliary, average=False)
    roles["student"] = role_states(plan, network, plan.student, average=plan.student_average)
    terms = [Term("teacher", "weights", network.parameters * network.teacher_bytes)]
    if plan.low_teacher:
        terms.append(Term("teacher", "copy in 8 bits", network.low_bytes))
    for role, states in roles.items():
        names = ("weights", "kept_gradients", "master", "moments", "average", "replica")
        parts = {name.replace("_", " "): getattr(states, name) for name in names}
        terms += [Term(role, name, size) for name, size in parts.items() if size]
    terms += [Term("process", "CUDA context", CUDA_CONTEXT)]
    if messages := message_bytes(plan, network):
        terms.append(Term("process", "messages", messages))
    phases = _phases(plan, network, roles)
    # The phase decides by its sum, gradients included.
    most = max(phases, key=lambda name: sum(term.bytes for term in phases[name]))
    terms += [term for term in phases[most] if term.bytes]
    activations = sum(term.bytes for term in phases[most] if term.what.endswith("activations"))
    process = sum(term.bytes for term in terms if term.role == "process")
    total = sum(term.bytes for term in terms)
    return Memory(
        terms,
        {name: sum(term.bytes for term in parts) for name, parts in phases.items()},
        total - activations - process,
        activations,
        sum(states.host for states in roles.values()),
    )


def _phases(plan: Plan, network: Network, roles: dict[str, States]) -> dict[str, list[Term]]:
    """By phase what is there only in it."""
    student, rows = roles["student"], plan.rows
    steps = 1 if plan.recompute_steps else plan.grad_steps
    footprint = network.footprint(plan.student, plan.recompute_blocks)
    states_between = plan.student_steps * rows * network.sample_bytes
    saved = (0.0 if plan.recompute_steps else steps * footprint.saved.of(rows)) + states_between
    backward = (steps - 1) * footprint.saved.of(rows) + footprint.peak.of(rows) + states_between
    copies = student.copies
    phases = {
        "student backward": [
            Term("student", "gradients", student.gradients),
            Term("student", "weights cast", copies),
            Term("student", "activations", backward),
        ],
    }
    if plan.auxiliary is not None:
        auxiliary = roles["auxiliary"]
        phases["rollout"] = [
            Term("student", "weights cast", copies),
            Term("student", "activations", saved),
            Term("rollout", "activations", network.forward.of(rollout_rows(plan))),
        ]
        phases["auxiliary update"] = [
            Term("auxiliary", "gradients", auxiliary.gradients),
            Term("auxiliary", "weights cast", auxiliary.copies),
            Term("auxiliary", "activations", network.footprint(plan.auxiliary, plan.recompute_blocks).peak.of(rows)),
        ]
        phases["sampling"] = [Term("sampling", "activations", network.forward.of(sampled_rows(plan)))]
    for role, states in roles.items():
        if states.stepped:
            phases[f"{role} step"] = [Term(role, "gradients of a step", states.stepped)]
    return phases


def rollout_rows(plan: Plan) -> int:
    """Network rows that a rollout computes at once, at most; a copy of the teacher shares no batch with others."""
    guided = 2 if plan.guided else 1
    shared = plan.auxiliary == "lora" and not plan.low_teacher
    rows = plan.rows * (guided + 1 if shared else guided)
    return rows if plan.max_rows is None else min(rows, plan.max_rows)


def sampled_rows(plan: Plan) -> int:
    """Rows of the student that are generated at once for the auxiliary's updates."""
    wanted = plan.accumulation * max(1, plan.cycle_auxiliary)
    return plan.rows * min(wanted, max(1, plan.sample_rows // plan.rows))
