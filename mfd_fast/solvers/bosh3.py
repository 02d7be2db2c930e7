"""Bogacki-Shampine 3(2): order 3, embedded order 2; three evaluations a step because the last stage is reused."""

from mfd_fast.solvers.runge_kutta import RungeKutta

BOSH3 = RungeKutta(
    order=3,
    nodes=(1 / 2, 3 / 4, 1.0),
    matrix=((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    weights=(2 / 9, 1 / 3, 4 / 9, 0.0),
    error_weights=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    error_order=3,
)
