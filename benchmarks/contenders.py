"""Every way of integrating teacher and auxiliary that is compared: this package's and the others'."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import mfd_fast
from fields import NO_LABEL, Pair
from mfd_fast.released import released_arithmetic
from mfd_fast.types import VelocityField
from peers import loops
from peers.guided import conditional, guided
from peers.libraries import torchdiffeq_lock_step, torchdiffeq_same_numbers, torchode_euler
from workload import GUIDANCE, STEP_SIZE, Draw, Velocities, conditions

Run = Callable[[Draw], Velocities]


class Way(NamedTuple):
    """One way to integrate both fields."""

    name: str
    run: Run
    same_numbers: bool = False
    """Whether it must give this package's Euler numbers to rounding."""


class Choice(NamedTuple):
    """Solver and precision of this package for a pair."""

    solver: str
    step_size: float
    auxiliary_solver: str
    auxiliary_step_size: float
    dtype: torch.dtype = torch.float32
    steps: int | None = None
    """So many equal steps of the teacher in every row, in place of its step size."""

    def words(self) -> str:
        """The choice as it would be written in a table."""
        own = f"{self.solver} {self.step_size:g}" if self.steps is None else f"{self.solver} {self.steps} steps"
        other = f"{self.auxiliary_solver} {self.auxiliary_step_size:g}"
        return f"{own if own == other else f'{own}, auxiliary {other}'}, {str(self.dtype).removeprefix('torch.')}"


def euler(step_size: float = STEP_SIZE, dtype: torch.dtype = torch.float32) -> Choice:
    """Euler steps for both fields."""
    return Choice("euler", step_size, "euler", step_size, dtype)


class Own:
    """This package's runners on a pair in float32 and, made once, in bfloat16."""

    def __init__(self, pair: Pair) -> None:
        networks = (pair.teacher, pair.auxiliary)
        self._networks: dict[torch.dtype, tuple[nn.Module, ...]] = {torch.float32: networks}
        self._networks[torch.bfloat16] = tuple(copy.deepcopy(network).bfloat16() for network in networks)

    def way(self, choice: Choice, runner: str = "compiled") -> Way:
        """Mean velocities as ``choice`` says, by one runner."""
        teacher, auxiliary = self._networks[choice.dtype]
        options: dict[str, Any] = {
            "solver": choice.solver,
            "step_size": choice.step_size if choice.steps is None else None,
            "steps": choice.steps,
            "auxiliary_solver": choice.auxiliary_solver,
            "auxiliary_step_size": choice.auxiliary_step_size,
            "field_dtype": choice.dtype,
            "runner": runner,
        }

        def run(draw: Draw) -> Velocities:
            u: Velocities = mfd_fast.mean_velocity_pair(
                teacher, auxiliary, draw.x, draw.t, draw.r, **options, **conditions(draw)
            )
            return u

        return Way(f"mfd_fast {runner}: {choice.words()}", run, same_numbers=choice == euler())


def torch_peers(pair: Pair) -> list[Way]:
    """Euler 0.02 by loops and by the libraries of PyTorch; eager, as they come."""
    fields = (guided(pair.teacher, GUIDANCE, NO_LABEL), conditional(pair.auxiliary))

    def both(integrate: Callable[..., torch.Tensor]) -> Run:
        @torch.no_grad()
        def run(draw: Draw) -> Velocities:
            u_teacher, u_auxiliary = (
                integrate(field, draw.x, draw.t, draw.r, draw.label, STEP_SIZE) for field in fields
            )
            return u_teacher, u_auxiliary

        return run

    return [
        Way("torchdiffeq Euler 0.02, same numbers", both(torchdiffeq_same_numbers), same_numbers=True),
        Way("torchdiffeq Euler 0.02, rescaled", both(torchdiffeq_lock_step)),
        Way("torchode Euler 0.02", both(torchode_euler), same_numbers=True),
        Way("eager lock-step Euler 0.02", both(loops.lock_step), same_numbers=True),
        Way("row by row Euler 0.02", both(loops.row_by_row), same_numbers=True),
        released_loop(pair, torch.float32),
        released_loop(pair, torch.bfloat16),
    ]


def released_loop(pair: Pair, dtype: torch.dtype) -> Way:
    """The released script's arithmetic, row by row, with networks, times and x_t in ``dtype``."""
    networks = [copy.deepcopy(network).to(dtype) for network in pair[:2]]

    def field(network: nn.Module) -> VelocityField:
        return lambda x, t, **condition: network(x.to(dtype), t.float(), **condition)

    teacher, auxiliary = (field(network) for network in networks)

    @torch.no_grad()
    def run(draw: Draw) -> Velocities:
        given = conditions(draw)
        return released_arithmetic(teacher, auxiliary, *draw[:3], step_size=STEP_SIZE, dtype=dtype, **given)

    return Way(f"released loop, {str(dtype).removeprefix('torch.')}", run)


class Diffrax:
    """diffrax on the same two networks, re-stated in jax.numpy with their weights copied, float32."""

    def __init__(self, pair: Pair) -> None:
        from peers import diffrax_peer
        from peers.jax_networks import translate

        self._peer = diffrax_peer
        self._fields = tuple(translate(network) for network in (pair.teacher, pair.auxiliary))
        self._guidance = (diffrax_peer.Guidance(GUIDANCE, NO_LABEL), None)
        self._made: dict[tuple[str, str], tuple[Any, ...]] = {}

    def way(self, choice: "DiffraxChoice") -> Way:
        """One of diffrax's solvers, as ``choice`` says."""
        how, solver, *amounts = choice
        if (how, solver) not in self._made:
            make = {
                "rescaled": self._peer.rescaled_batch,
                "rows": self._peer.fixed_rows,
                "adaptive": self._peer.adaptive_rows,
            }[how]
            self._made[how, solver] = tuple(
                make(field, solver, guidance) for (field, _), guidance in zip(self._fields, self._guidance, strict=True)
            )
        solves = self._made[how, solver]

        def run(draw: Draw) -> Velocities:
            from peers.jax_networks import to_jax, to_torch

            given = [to_jax(part) for part in draw]
            u = []
            for solve, (_, parameters), amount in zip(solves, self._fields, amounts, strict=True):
                argument: Any = amount
                if how == "rows":
                    argument = to_jax(loops.steps_of(draw.t, draw.r, amount).float())
                u.append(solve(parameters, *given, argument)[0])
            return to_torch(u[0]), to_torch(u[1])

        return Way(f"diffrax {solver}, {how} {amounts[0]:g}, auxiliary {amounts[1]:g}", run)


class DiffraxChoice(NamedTuple):
    """How diffrax integrates a pair."""

    how: str
    """rescaled: so many equal steps in every row; rows: a largest step; adaptive: a tolerance."""
    solver: str
    amount: float
    auxiliary_amount: float


# What is tried at equal error, cheapest first by evaluations. The auxiliary is not guided and needs far fewer.
OWN_CANDIDATES = (
    Choice("ab2", 0.0, "midpoint", 0.3, torch.bfloat16, steps=5),
    Choice("ab2", 0.0, "midpoint", 0.2, torch.bfloat16, steps=6),
    Choice("rk4", 0.0, "midpoint", 0.3, torch.bfloat16, steps=2),
    Choice("midpoint", 0.0, "midpoint", 0.3, torch.bfloat16, steps=4),
    Choice("ab2", 0.043, "midpoint", 0.3, torch.bfloat16),
    Choice("ab2", 0.043, "midpoint", 0.2, torch.bfloat16),
    Choice("ab2", 0.03, "midpoint", 0.2, torch.bfloat16),
)
DIFFRAX_CANDIDATES = (
    DiffraxChoice("rescaled", "Midpoint", 4, 2),
    DiffraxChoice("rescaled", "Bosh3", 2, 1),
    DiffraxChoice("rescaled", "Ralston", 4, 2),
    DiffraxChoice("rescaled", "Bosh3", 3, 1),
    DiffraxChoice("rescaled", "Midpoint", 5, 2),
    DiffraxChoice("rows", "Midpoint", 0.08, 0.3),
    DiffraxChoice("rescaled", "Heun", 4, 2),
    DiffraxChoice("rescaled", "Dopri5", 2, 1),
    DiffraxChoice("adaptive", "Bosh3", 0.1, 0.3),
)
