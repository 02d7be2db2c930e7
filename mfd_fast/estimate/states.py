"""Memory of weights and what is kept for them, by formula (Rajbhandari et al. 2020, arXiv 1910.02054, section 3)."""

from typing import NamedTuple

from mfd_fast.estimate.network import Network
from mfd_fast.estimate.plan import Plan
from mfd_fast.training import zero

MASTER_BYTES = 4
GRADIENT_BYTES = 4
"""Of roles that are not shared out: their weights are float32, and so are the gradients."""
CUDA_CONTEXT = 2**29
"""Bytes that a process takes for itself, its kernels and its libraries."""


class States(NamedTuple):
    """Bytes of one trained role on one GPU."""

    weights: float
    gradients: float
    """In the role's own update, at most."""
    kept_gradients: float
    """Their share that keeps its memory between updates too (stage 3)."""
    stepped: float
    """In the step of a role that is shared out: its share of the gradients, and float32 ones of a group of weights."""
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
    """Bytes in the host's memory: float32 weights, gradients and moments, and what goes to and comes from the GPU."""


def role_states(plan: Plan, network: Network, kind: str, *, average: bool) -> States:
    """States of a role trained as ``kind``, "full" or "lora"."""
    moments = 2 * plan.optimizer_bits // 8
    if kind == "lora" or plan.zero == 0:
        count = network.adapter if kind == "lora" else network.parameters
        mixed = kind == "full" and plan.compute_bytes < MASTER_BYTES
        return States(
            weights=count * MASTER_BYTES,
            gradients=count * GRADIENT_BYTES,
            kept_gradients=0.0,
            stepped=0.0,
            master=0.0,
            moments=count * moments,
            average=count * MASTER_BYTES * average,
            replica=0.0,
            copies=count * plan.compute_bytes * mixed,
            host=0.0,
        )
    count, size, share = network.parameters, plan.compute_bytes, 1 / plan.gpus
    here = 0.0 if plan.offload else count * share
    averages = MASTER_BYTES * average
    # DeepSpeed flattens the gradients of a group, and casts them if they are not float32.
    group = min(zero.GROUP, count) * share * (GRADIENT_BYTES + (size if size < GRADIENT_BYTES else 0))
    on_host = 2 * MASTER_BYTES + moments + size * (1 + (plan.accumulation > 1)) + averages
    return States(
        weights=count * size * (share if plan.zero == 3 else 1),
        gradients=(count * size if plan.zero == 1 else 0.0) + (here * size if plan.zero < 3 else 0.0),
        kept_gradients=here * size * (plan.zero == 3),
        stepped=0.0 if plan.offload else group + (here * size if plan.zero < 3 else 0.0),
        master=here * MASTER_BYTES,
        moments=here * moments,
        average=here * averages,
        replica=count * size * (plan.zero == 3),
        copies=0.0,
        host=count * share * on_host * plan.offload,
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
    if not (plan.zero and plan.full_roles):
        return whole
    # Two of ZeRO's messages for gradients and one for weights; in stage 3 what is gathered lives for a while.
    buffers = 5 if plan.zero == 3 else 3
    return whole + buffers * min(zero.BUCKET, network.parameters) * plan.compute_bytes
