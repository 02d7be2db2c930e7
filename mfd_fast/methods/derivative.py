"""The derivative of a student's network along a trajectory, ``du/dt = (d_x u) v + d_t u`` with r fixed."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mfd_fast.config import one_of
from mfd_fast.path import expand_times
from mfd_fast.rows import first_rows
from mfd_fast.types import Condition, VelocityField

DERIVATIVES = ("jvp", "finite-difference")
DERIVATIVE = one_of(*DERIVATIVES)
STEPS = {torch.float64: 1e-4, torch.float32: 2e-3}
"""Step of the central difference: small against the fastest time feature, large against rounding."""

Map = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def total_derivative(
    field: VelocityField,
    x: Tensor,
    t: Tensor,
    velocity: Tensor,
    condition: Condition,
    *,
    r: Tensor | None = None,
    kind: str = "jvp",
) -> tuple[Tensor, Tensor]:
    """``u = field(x, t, r)`` and ``du/dt`` along ``(velocity, 1, 0)``, both ``[B, ...]`` without gradient.

    The random state is as before afterwards: a following call with gradient drops out the same features.

    Args:
        field: the student's network.
        x: points ``[B, ...]``.
        t: times ``[B]``.
        velocity: ``[B, ...]``, of the trajectory through x.
        condition: the field's condition.
        r: ends ``[B]`` for a field with a second time.
        kind: "jvp", exact, in forward mode; attention is computed by torch's own operations then. Or
            "finite-difference", two evaluations, for networks with operations that have no forward mode.

    Raises:
        RuntimeError: an operation of the field has no forward mode.
    """
    rows = first_rows(condition, len(x)) | ({} if r is None else {"r": r})

    def at(x: Tensor, t: Tensor) -> Tensor:
        return field(x, t, **rows).to(x.dtype)

    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        return (_jvp if kind == "jvp" else _central_difference)(at, x, t, velocity)


def _jvp(at: Map, x: Tensor, t: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    try:
        with sdpa_kernel(SDPBackend.MATH):
            found = torch.func.jvp(at, (x, t), (velocity, torch.ones_like(t)))
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise RuntimeError(
            f"the student's network has no forward-mode derivative ({reason}): "
            f"set distill.method_options.derivative to finite-difference"
        ) from error
    return found[0], found[1]


def _central_difference(at: Map, x: Tensor, t: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    step = STEPS[x.dtype]
    values = []
    for shift in (0.0, step, -step):
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            values.append(at(x + shift * velocity, t + shift))
    u, after, before = values
    return u, (after - before) / (2 * step)


def tangent(
    u: Tensor, velocity: Tensor, derivative: Tensor, gap: Tensor, *, share: float = 1.0, normaliser: float | None = None
) -> Tensor:
    """What moves u to satisfy ``u = v - gap du/dt``: ``g = (v - u) - share gap du/dt``, over ``|g| + normaliser``.

    Args:
        u, velocity, derivative: ``[B, ...]``, of `total_derivative`.
        gap: ``t - r`` ``[B]``.
        share: of the derivative; below 1 the rest is a pull to the straight velocity (arXiv 2506.14603).
        normaliser: added to the norm of a row that divides it; None leaves g as it is.
    """
    g = (velocity - u) - share * expand_times(gap, u) * derivative
    if normaliser is None:
        return g
    return g / (expand_times(g.flatten(1).norm(dim=1), g) + normaliser)
