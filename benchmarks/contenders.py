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
ROLES = ("teacher", "auxiliary")
GIVEN = {"teacher": ("condition", "negative_condition", "guidance_scale"), "auxiliary": ("condition",)}
"""Which of `workload.conditions` each field gets."""


class Way(NamedTuple):
    """One way to integrate both fields."""

    name: str
    run: Run
    same_numbers: bool = False
    """Whether it must give this package's Euler numbers to rounding."""


class Half(NamedTuple):
    """One way to integrate one of the two fields."""

    name: str
    run: Callable[[Draw], torch.Tensor]


class Choice(NamedTuple):
    """Solver and precision of this package for one field."""

    solver: str
    step_size: float | None = None
    dtype: torch.dtype = torch.float32
    steps: int | None = None
    """So many equal steps in every row, in place of a step size."""

    def words(self) -> str:
        """The choice as it would be written in a table."""
        return f"{self._how()}, {str(self.dtype).removeprefix('torch.')}"

    def with_auxiliary(self, auxiliary: "Choice") -> str:
        """Both choices of a pair in words."""
        if auxiliary == self:
            return self.words()
        own, other = self._how(), auxiliary._how()
        if auxiliary.dtype != self.dtype:
            return f"{self.words()}, auxiliary {auxiliary.words()}"
        return f"{own}, auxiliary {other}, {self.words().rpartition(', ')[2]}"

    def _how(self) -> str:
        return f"{self.solver} {self.step_size:g}" if self.steps is None else f"{self.solver} {self.steps} steps"

    def options(self) -> dict[str, Any]:
        """Arguments of `mfd_fast.mean_velocity`."""
        return {"solver": self.solver, "step_size": self.step_size, "steps": self.steps, "field_dtype": self.dtype}


def euler(step_size: float = STEP_SIZE, dtype: torch.dtype = torch.float32) -> Choice:
    """Euler steps."""
    return Choice("euler", step_size, dtype)


class Own:
    """This package's runners on a pair in float32 and, made once, in bfloat16."""

    def __init__(self, pair: Pair) -> None:
        networks = (pair.teacher, pair.auxiliary)
        self._networks: dict[torch.dtype, tuple[nn.Module, ...]] = {torch.float32: networks}
        self._networks[torch.bfloat16] = tuple(copy.deepcopy(network).bfloat16() for network in networks)

    def half(self, role: str, choice: Choice) -> Half:
        """The mean velocity of one of the fields, by its compiled copy."""
        field, names = self._networks[choice.dtype][ROLES.index(role)], GIVEN[role]

        def run(draw: Draw) -> torch.Tensor:
            given = {name: value for name, value in conditions(draw).items() if name in names}
            u: torch.Tensor = mfd_fast.mean_velocity(field, *draw[:3], runner="compiled", **choice.options(), **given)
            return u

        return Half(choice.words(), run)

    def way(self, choice: Choice, auxiliary: Choice | None = None, runner: str = "compiled") -> Way:
        """Both mean velocities, the auxiliary's by a step size of its own where it has a choice of its own."""
        other = choice if auxiliary is None else auxiliary
        if other.dtype != choice.dtype or (other != choice and other.step_size is None):
            raise ValueError("a pair has one dtype, and an auxiliary on its own a step size")
        teacher, second = self._networks[choice.dtype]
        options = choice.options() | {"runner": runner}
        if other != choice:
            options |= {"auxiliary_solver": other.solver, "auxiliary_step_size": other.step_size}

        def run(draw: Draw) -> Velocities:
            u: Velocities = mfd_fast.mean_velocity_pair(teacher, second, *draw[:3], **options, **conditions(draw))
            return u

        same = choice == other == euler()
        return Way(f"mfd_fast {runner}: {choice.with_auxiliary(other)}", run, same_numbers=same)


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
        self._made: dict[tuple[str, str, str], Any] = {}

    def half(self, role: str, choice: "DiffraxChoice") -> Half:
        """The mean velocity of one of the fields by one of diffrax's solvers."""
        from peers.jax_networks import to_jax, to_torch

        place = ROLES.index(role)
        field, parameters = self._fields[place]
        key = (role, choice.how, choice.solver)
        if key not in self._made:
            make = {
                "rescaled": self._peer.rescaled_batch,
                "rows": self._peer.fixed_rows,
                "adaptive": self._peer.adaptive_rows,
            }[choice.how]
            self._made[key] = make(field, choice.solver, self._guidance[place])
        solve = self._made[key]

        def run(draw: Draw) -> torch.Tensor:
            argument: Any = to_jax(torch.tensor(float(choice.amount)))
            if choice.how == "rows":
                argument = to_jax(loops.steps_of(draw.t, draw.r, choice.amount).float())
            return to_torch(solve(parameters, *(to_jax(part) for part in draw), argument)[0])

        return Half(choice.words(), run)

    def way(self, choice: "DiffraxChoice", auxiliary: "DiffraxChoice | None" = None) -> Way:
        """Both mean velocities, one after the other."""
        other = choice if auxiliary is None else auxiliary
        first, second = self.half("teacher", choice), self.half("auxiliary", other)
        return Way(f"diffrax {first.name}, auxiliary {second.name}", lambda draw: (first.run(draw), second.run(draw)))


class DiffraxChoice(NamedTuple):
    """How diffrax integrates a field."""

    how: str
    """rescaled: so many equal steps in every row; rows: a largest step; adaptive: a tolerance."""
    solver: str
    amount: float

    def words(self) -> str:
        """The choice as it would be written in a table."""
        return f"{self.solver} {self.how} {self.amount:g}"
