"""Memory of weights and what is kept for them, by formula (Rajbhandari et al. 2020, arXiv 1910.02054, section 3)."""

from typing import NamedTuple

from mfd_fast.estimate.network import Network
from mfd_fast.estimate.plan import Plan

MASTER_BYTES = 4
GRADIENT_BYTES = 4
"""Of roles that are not shared out: their weights are float32, and so are the gradients."""
ZERO_BUCKET = 50_000_000
"""Elements of one of ZeRO's messages (`mfd_fast.training.zero`); there are two for gradients and one for weights."""
CUDA_CONTEXT = 2**29
"""Bytes that a process takes for itself, its kernels and its libraries."""


class States(NamedTuple):
    """Bytes of one trained role on one GPU."""

    weights: float
    gradients: float
    master: float
    """Float32 weights beside those that are computed with."""
    moments: float
    average: float
    """The averaged weights, float32."""
    replica: float
    """Whole weights that rollouts use where ZeRO's stage 3 has shared them out."""
    copies: float
    """Weights in the precision of the products, made by autocast in each update and rollout."""
    host: float
    """Bytes in the host's memory, for float32 weights, moments and the gradients they are updated with."""


def role_states(plan: Plan, network: Network, kind: str, *, average: bool) -> States:
    """States of a role trained as ``kind``, "full" or "lora"."""
    moments = 2 * plan.optimizer_bits // 8
    if kind == "lora" or plan.zero == 0:
        count = network.adapter if kind == "lora" else network.parameters
        mixed = kind == "full" and plan.compute_bytes < MASTER_BYTES
        return States(
            weights=count * MASTER_BYTES,
            gradients=count * GRADIENT_BYTES,
            master=0.0,
            moments=count * moments,
            average=count * MASTER_BYTES * average,
            replica=0.0,
            copies=count * plan.compute_bytes * mixed,
            host=0.0,
        )
    count, size, share = network.parameters, plan.compute_bytes, 1 / plan.gpus
    kept = 0.0 if plan.offload else count * share
    averages = MASTER_BYTES * average
    return States(
        weights=count * size * (share if plan.zero == 3 else 1),
        gradients=count * size * (share if plan.zero >= 2 else 1),
        master=kept * MASTER_BYTES,
        moments=kept * moments,
        average=kept * averages,
        replica=count * size * (plan.zero == 3),
        copies=0.0,
        host=count * share * (MASTER_BYTES + moments + size + averages) * plan.offload,
    )


def message_bytes(plan: Plan, network: Network) -> float:
    """Buffers of messages between processes."""
    if plan.gpus == 1 and plan.zero == 0:
        return 0.0
    whole = 0.0
    if plan.zero == 0 or plan.full_roles < 2:
        # Gradients that are not shared out are averaged in one message of float32.
        kinds = [kind for kind in (plan.auxiliary, plan.student) if kind == "lora" or (kind and plan.zero == 0)]
        counts = [network.adapter if kind == "lora" else network.parameters for kind in kinds]
        whole = max(counts, default=0) * 4 * (plan.gpus > 1)
    shared = 3 * min(ZERO_BUCKET, network.parameters) * plan.compute_bytes if plan.zero and plan.full_roles else 0
    return whole + shared
