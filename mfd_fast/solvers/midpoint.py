"""Explicit midpoint method: order 2, two evaluations a step."""

from mfd_fast.solvers.runge_kutta import RungeKutta

MIDPOINT = RungeKutta(order=2, nodes=(0.5,), matrix=((0.5,),), weights=(0.0, 1.0))
