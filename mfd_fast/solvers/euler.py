"""Euler's method: order 1, one evaluation a step. On the straight path it is also first-order DDIM."""

from mfd_fast.solvers.runge_kutta import RungeKutta

EULER = RungeKutta(order=1, nodes=(), matrix=(), weights=(1.0,))
