"""Heun's method (explicit trapezoidal rule): order 2, two evaluations a step. Not Heun's method of order 3."""

from mfd_fast.solvers.runge_kutta import RungeKutta

HEUN = RungeKutta(order=2, nodes=(1.0,), matrix=((1.0,),), weights=(0.5, 0.5))
