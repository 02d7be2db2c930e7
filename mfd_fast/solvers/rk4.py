"""The classical Runge-Kutta method: order 4, four evaluations a step."""

from mfd_fast.solvers.runge_kutta import RungeKutta

RK4 = RungeKutta(
    order=4,
    nodes=(1 / 2, 1 / 2, 1.0),
    matrix=((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
)
