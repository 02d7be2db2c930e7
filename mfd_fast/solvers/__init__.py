"""Solvers: one file each. `SOLVERS` is the list; `get_solver` reads names, including ``torchdiffeq:<method>``."""

from difflib import get_close_matches

from mfd_fast.solvers.ab2 import AB2
from mfd_fast.solvers.base import Solver as Solver
from mfd_fast.solvers.bosh3 import BOSH3
from mfd_fast.solvers.euler import EULER
from mfd_fast.solvers.heun import HEUN
from mfd_fast.solvers.midpoint import MIDPOINT
from mfd_fast.solvers.rk4 import RK4
from mfd_fast.solvers.torchdiffeq import PREFIX
from mfd_fast.solvers.torchdiffeq import TorchdiffeqSolver as TorchdiffeqSolver

SOLVERS: dict[str, Solver] = {
    "euler": EULER,
    "midpoint": MIDPOINT,
    "heun": HEUN,
    "ab2": AB2,
    "rk4": RK4,
    "bosh3": BOSH3,
}


def get_solver(name: str) -> Solver | TorchdiffeqSolver:
    """The solver called ``name``; ValueError lists the valid names, TypeError for what is not a string."""
    if not isinstance(name, str):
        raise TypeError(f"solver must be the name of a solver, got {type(name).__name__}")
    if name in SOLVERS:
        return SOLVERS[name]
    if name.startswith(PREFIX):
        return TorchdiffeqSolver(name.removeprefix(PREFIX))
    close = get_close_matches(name, SOLVERS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"solver must be one of {', '.join(SOLVERS)} or {PREFIX}<method>, got {name!r}{hint}")
