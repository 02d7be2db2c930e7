"""A solver of your own: a Butcher tableau and a name are enough for every function and command of the package.

python examples/own_solver.py
"""

import torch

import mfd_fast
from mfd_fast.closed_forms import Gaussian
from mfd_fast.solvers import SOLVERS
from mfd_fast.solvers.runge_kutta import RungeKutta

RALSTON = RungeKutta(order=2, nodes=(2 / 3,), matrix=((2 / 3,),), weights=(1 / 4, 3 / 4))


def main() -> dict[str, float]:
    """Error of the mean velocity of a Gaussian's flow by solver."""
    SOLVERS["ralston"] = RALSTON
    field = Gaussian(mean=1.0, std=0.5)
    x = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = field.mean_velocity(x, torch.full((64,), 0.9).double(), torch.full((64,), 0.1).double())
    errors = {}
    for solver in ("euler", "midpoint", "ralston"):
        u = mfd_fast.mean_velocity(field, x, 0.9, 0.1, solver=solver, steps=20)
        errors[solver] = float((u - exact).norm() / exact.norm())
        print(f"{solver:10} relative error {errors[solver]:.1e} with 20 steps")
    return errors


if __name__ == "__main__":
    main()
