"""What a distillation will take: memory of each GPU by term, and the least time of an update. docs/estimate.md.

Arithmetic on measured constants, no network is built: see `NETWORKS` for where they come from.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

GIB = 2**30
ROOM = 0.5
"""GiB of a card that are never free: the driver's, and fragments."""
CONTEXT = 0.5
"""GiB of the CUDA context and the libraries' workspaces."""
MESSAGES = 0.5
"""GiB of DeepSpeed's message buffers at the bucket size of `mfd_fast.training.zero`."""
EFFICIENCY = 0.75
"""Share of the peak that large matrix products reach; the rest of a network is slower, so times are lower bounds."""


class Network(NamedTuple):
    """Measured constants of a network; memory in GiB for each row of a batch."""

    parameters: int
    adapter: int | None
    """Parameters of one LoRA role of rank 64; None where that was not measured."""
    gflop: float
    """Of one forward of one row."""
    saved: float
    """Kept for the backward pass in 16 bits, all weights trained."""
    saved_adapter: float | None
    """The same with frozen weights and LoRA."""
    saved_float32: float | None
    """The same as ``saved`` in float32."""
    saved_checkpointed: float | None
    """With every block computed again in the backward pass."""
    cache: float
    """Keys and values that a rollout keeps."""
    teacher_bytes: int
    """Of each of the frozen teacher's weights."""


NETWORKS = {
    # 20 blocks of 189 MiB (157 MiB with frozen weights), bfloat16, 32 x 32 tokens and 300 of text.
    "sana-1.6b": Network(1_604_462_752, 34_400_000, 2967.0, 3.7, 3.07, None, 0.3, 0.054, 2),
    # 12 frames of 16 x 50 x 50, counted on torch's meta data of a forward pass, not on a GPU.
    "occfm": Network(11_508_880, None, 220.5, 1.545, None, 2.432, None, 0.0, 4),
}


class Card(NamedTuple):
    """A GPU: memory in GiB, peak of 16-bit matrix products in TFLOP/s."""

    memory: float
    peak: float


CARDS = {"3090": Card(24, 71), "pro-6000": Card(96, 503), "h200": Card(139, 790)}


@dataclass(frozen=True)
class Plan:
    """How a network is distilled.

    Raises:
        ValueError: a value that is none, or a combination without measurements.
    """

    network: str
    auxiliary: str = "full"
    student: str = "full"
    gpus: int = 1
    rows: int = 1
    """Rows of one backward pass on one GPU."""
    precision: str = "bfloat16"
    zero_stage: int = 0
    offload: bool = False
    optimizer_bits: int = 32
    """Of each of Adam's two averages of a full role; with ZeRO, 8 is arithmetic only."""
    checkpointing: bool = False
    steps: int = 1
    """Steps of the student that are kept for one backward pass."""

    def __post_init__(self) -> None:
        choices = {
            "network": tuple(NETWORKS),
            "auxiliary": ("full", "lora"),
            "student": ("full", "lora"),
            "precision": ("float32", "bfloat16", "float16"),
            "zero_stage": (0, 1, 2, 3),
            "optimizer_bits": (8, 32),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        for name in ("gpus", "rows", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.offload and not self.zero_stage:
            raise ValueError("offload needs zero_stage 1, 2 or 3, got 0")
        for role in (self.auxiliary, self.student):
            self.saved(role)

    def saved(self, role: str) -> float:
        """GiB that one row keeps for the backward pass of a "full" or "lora" role; ValueError if nobody measured it."""
        measured = NETWORKS[self.network]
        if self.checkpointing:
            found, what = measured.saved_checkpointed, "checkpointing"
        elif role == "lora":
            found, what = measured.saved_adapter, "LoRA roles"
        else:
            found = measured.saved_float32 if self.precision == "float32" else measured.saved
            what = f"precision {self.precision}"
        if found is None:
            raise ValueError(f"{what}: not measured for {self.network}")
        return found


class Estimate(NamedTuple):
    """Memory in GiB."""

    gpu: dict[str, float]
    """By term, of each GPU."""
    host: float
    """Of the host for each GPU: what offload moves there."""

    @property
    def states(self) -> float:
        """Weights, gradients and optimiser's states of all roles on each GPU."""
        return sum(self.gpu[role] for role in ("teacher", "auxiliary", "student"))

    @property
    def total(self) -> float:
        """All terms of a GPU."""
        return sum(self.gpu.values())

    @property
    def largest(self) -> str:
        """The largest term."""
        return max(self.gpu, key=self.gpu.__getitem__)

    def fits(self, memory: float) -> bool:
        """Whether a card of so many GiB is enough."""
        return self.total <= memory - ROOM


def estimate(plan: Plan) -> Estimate:
    """The memory of a plan; formulas in docs/estimate.md."""
    network = NETWORKS[plan.network]
    roles = {"auxiliary": plan.auxiliary, "student": plan.student}
    parts = {name: _role(plan, kind) for name, kind in roles.items()}
    gpu = {
        "teacher": network.parameters * network.teacher_bytes / GIB,
        **{name: part[0] for name, part in parts.items()},
        "activations": plan.rows * max(plan.saved(plan.auxiliary), plan.steps * plan.saved(plan.student)),
        "rollout": plan.rows * network.cache,
        "context": CONTEXT + (MESSAGES if plan.zero_stage else 0.0),
    }
    return Estimate(gpu, sum(part[1] for part in parts.values()))


def _role(plan: Plan, kind: str) -> tuple[float, float]:
    """GiB of a trained role on each GPU, and on the host for each GPU."""
    network = NETWORKS[plan.network]
    adam = 2 * plan.optimizer_bits // 8
    if kind == "lora":  # beside the teacher's weights, float32, in every process
        assert network.adapter is not None, "a plan without measurements is refused when it is made"
        return network.adapter * (4 + 4 + 8) / GIB, 0.0
    low = 4 if plan.precision == "float32" else 2
    if plan.zero_stage == 0:  # float32 weights, which are the network's
        return network.parameters * (4 + 4 + adam) / GIB, 0.0
    shared = 4 + adam
    share = {1: 2 * low, 2: low + low / plan.gpus, 3: low + 2 * low / plan.gpus}[plan.zero_stage]
    here = 0.0 if plan.offload else shared / plan.gpus
    there = (shared + low) / plan.gpus if plan.offload else 0.0
    return network.parameters * (share + here) / GIB, network.parameters * there / GIB


class Seconds(NamedTuple):
    """Lower bounds of the time of one backward pass of each role and of the rollouts of a student update."""

    auxiliary: float
    student: float
    rollouts: float


def seconds(plan: Plan, card: Card, *, evaluations: float, guided: bool, student_steps: int = 1) -> Seconds:
    """The least time of the matrix products; ``evaluations`` of each of the two fields of a row's rollouts."""
    forward = plan.rows * NETWORKS[plan.network].gflop / (1000 * EFFICIENCY * card.peak)
    again = 1 if plan.checkpointing else 0
    sampling = student_steps * forward
    return Seconds(
        (3 + again) * forward + sampling, (3 + again) * sampling, evaluations * (3 if guided else 2) * forward
    )


def ways_to_fit(plan: Plan, memory: float) -> list[tuple[str, Estimate]]:
    """Small changes of a plan that make it fit, as command-line options."""
    return [(words, found) for words, found in _changes(plan) if found.fits(memory)]


def _changes(plan: Plan) -> Iterator[tuple[str, Estimate]]:
    full = "full" in (plan.auxiliary, plan.student)
    changes: list[tuple[str, dict[str, int | bool]]] = []
    if NETWORKS[plan.network].saved_checkpointed is not None and not plan.checkpointing:
        changes.append(("--checkpointing", {"checkpointing": True}))
    if full:
        changes += [
            (f"--gpus {gpus} --zero 2", {"gpus": gpus, "zero_stage": 2}) for gpus in (2, 4, 8) if gpus > plan.gpus
        ]
        if not plan.offload:
            changes.append(("--zero 2 --zero-offload", {"zero_stage": 2, "offload": True}))
    if plan.rows > 1:
        changes.append(("--rows 1", {"rows": 1}))
    for words, values in changes:
        yield words, estimate(replace(plan, **values))  # type: ignore[arg-type]
