"""diffrax (JAX) on rows with their own intervals: jit, vmap over rows, one compilation a solver and batch size."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

# One thread, like everything else here; read by XLA when it starts.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import diffrax
import jax
import jax.numpy as jnp
from jax import Array

from peers.jax_networks import Parameters, RowField

# Nothing is differentiated here; a loop without a bound on its steps, which keeps nothing for that, is the fastest.
FORWARD: dict[str, Any] = {"adjoint": diffrax.ForwardMode(), "max_steps": None}


class Guidance(NamedTuple):
    """Classifier-free guidance of a row's velocity."""

    scale: float
    no_label: int


def with_guidance(field: RowField, guidance: Guidance | None) -> RowField:
    """The guided velocity of one row: two evaluations that vmap puts into one batch."""
    if guidance is None:
        return field

    def guided(p: Parameters, x: Array, t: Array, label: Array) -> Array:
        labels = jnp.stack([jnp.full_like(label, guidance.no_label), label])
        without, given = jax.vmap(field, (None, None, None, 0))(p, x, t, labels)
        velocity: Array = without + guidance.scale * (given - without)
        return velocity

    return guided


Integrate = Callable[..., tuple[Array, Array]]


def fixed_rows(field: RowField, solver: str, guidance: Guidance | None = None) -> Integrate:
    """``integrate(p, x, t, r, label, steps [B]) -> (mean velocity, evaluations [B])``: equal steps in each row.

    vmap over whole solves: rows have their own step sizes and numbers of steps; all are computed until the last is
    done.
    """

    def one(p: Parameters, x: Array, t: Array, r: Array, label: Array, steps: Array) -> tuple[Array, Array]:
        return _solve(field, solver, guidance, diffrax.ConstantStepSize(), (p, x, t, r, label), (r - t) / steps)

    return jax.jit(jax.vmap(one, (None, 0, 0, 0, 0, 0)))


def adaptive_rows(field: RowField, solver: str, guidance: Guidance | None = None) -> Integrate:
    """``integrate(p, x, t, r, label, tolerance [])``: every row with its own PID-controlled steps."""

    def one(p: Parameters, x: Array, t: Array, r: Array, label: Array, tolerance: Array) -> tuple[Array, Array]:
        control: Any = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        return _solve(field, solver, guidance, control, (p, x, t, r, label), None)

    return jax.jit(jax.vmap(one, (None, 0, 0, 0, 0, None)))


def _solve(
    field: RowField, solver: str, guidance: Guidance | None, control: Any, given: tuple[Any, ...], first: Any
) -> tuple[Array, Array]:
    p, x, t, r, label = given
    velocity = with_guidance(field, guidance)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda now, state, _: velocity(p, state, now, label)),
        getattr(diffrax, solver)(),
        t0=t,
        t1=r,
        dt0=first,
        y0=x,
        saveat=diffrax.SaveAt(t1=True),
        stepsize_controller=control,
        **FORWARD,
    )
    return (solution.ys[0] - x) / (r - t), solution.stats["num_steps"]


def rescaled_batch(field: RowField, solver: str, guidance: Guidance | None = None) -> Integrate:
    """``integrate(p, x, t, r, label, steps [])``: one solve of the batch on [0, 1], all rows in step."""

    def batch(p: Parameters, x: Array, t: Array, r: Array, label: Array, steps: Array) -> tuple[Array, Array]:
        rows = jax.vmap(with_guidance(field, guidance), (None, 0, 0, 0))
        shape = (-1, *[1] * (x.ndim - 1))
        width = r - t
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda s, state, _: width.reshape(shape) * rows(p, state, t + s * width, label)),
            getattr(diffrax, solver)(),
            t0=0.0,
            t1=1.0,
            dt0=1 / steps,
            y0=x,
            saveat=diffrax.SaveAt(t1=True),
            **FORWARD,
        )
        return (solution.ys[0] - x) / width.reshape(shape), solution.stats["num_steps"]

    return jax.jit(batch)
