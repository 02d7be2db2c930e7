"""Time by a model, never a measurement: operations over a share of a GPU's peak, or weights over its bandwidth."""

from typing import NamedTuple

from mfd_fast.estimate.network import Network
from mfd_fast.estimate.plan import Plan

EFFICIENCY = 0.7
"""Share of the peak that large matrix products reach."""


class Gpu(NamedTuple):
    """What a vendor says of a GPU."""

    title: str
    gib: float
    """Memory."""
    half: float
    """Operations a second with bfloat16 or float16 and float32 sums."""
    single: float
    """Operations a second in float32."""
    bandwidth: float
    """Bytes a second."""


GPUS = {
    "rtx-3090": Gpu("RTX 3090", 24, 71e12, 35.6e12, 0.936e12),
    "rtx-pro-6000": Gpu("RTX PRO 6000", 96, 503e12, 125e12, 1.79e12),
    "h200": Gpu("H200", 139, 790e12, 67e12, 4.3e12),
}


class Work(NamedTuple):
    """What updates cost one GPU, in forward passes of a row."""

    evaluations: float
    """Mean evaluations of teacher and auxiliary in a student update, for one sample."""
    rollout_rows: float
    """Network rows of the rollouts of one student update."""
    student: float
    """Forward passes of a row that one student update costs beside its rollouts."""
    auxiliary: float
    """Those of one auxiliary update, its samples included."""
    cycle: float
    """Those of a cycle over the student updates in it: everything that one student update costs."""


def work_of(plan: Plan) -> Work | None:
    """Network rows of an update on one GPU; None where an adaptive solver decides."""
    rows = plan.rows * plan.accumulation
    teacher, auxiliary = plan.evaluations.teacher, plan.evaluations.auxiliary
    if teacher is None or auxiliary is None:
        return None
    guided = 1 + 1 / plan.negative_every if plan.guided else 1
    paired = 0.0 if plan.auxiliary is None else auxiliary
    rollout = rows * (teacher * guided + paired) if plan.auxiliary is not None else 0.0
    again = plan.recompute_steps + plan.recompute_blocks
    student = rows * (plan.student_steps + plan.grad_steps * (_backward(plan.student) + again))
    one_auxiliary = 0.0
    if plan.auxiliary is not None:
        one_auxiliary = rows * (plan.student_steps + 1 + _backward(plan.auxiliary) + plan.recompute_blocks)
    cycle = rollout + student + one_auxiliary * plan.cycle_auxiliary / plan.cycle_student
    return Work(teacher + paired, rollout, student, one_auxiliary, cycle)


def _backward(kind: str) -> int:
    """Cost of a backward pass in forward passes: weights that are frozen get no gradient."""
    return 2 if kind == "full" else 1


def seconds(plan: Plan, network: Network, gpu: Gpu, passes: float) -> float:
    """The model's seconds for so many forward passes of a row."""
    peak = gpu.single if plan.precision == "float32" else gpu.half
    one_row = max(
        network.operations / (EFFICIENCY * peak),
        # The smallest batch of the cycle reads all weights for its rows.
        network.parameters * plan.compute_bytes / gpu.bandwidth / max(1, plan.rows),
    )
    return passes * one_row
