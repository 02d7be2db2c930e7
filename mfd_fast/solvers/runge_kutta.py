"""Explicit Runge-Kutta methods from their Butcher tableau."""

from dataclasses import dataclass

from torch import Tensor

from mfd_fast.path import expand_times
from mfd_fast.solvers.base import Step, Velocity


@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method.

    Attributes:
        order: order of convergence.
        nodes: times of the stages after the first, as fractions of the step.
        matrix: row i holds the weights of the earlier stages in the state of stage i + 1.
        weights: weights of the stages in the increment.
        error_weights: weights of the stages in the error estimate, empty without one.
        error_order: order of the local error estimate, None without one.

    A method whose last stage sits at the end of the step (its matrix row equals ``weights``) hands that velocity on.
    """

    order: int
    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error_weights: tuple[float, ...] = ()
    error_order: int | None = None

    @property
    def reuses_last_stage(self) -> bool:
        """Whether the last stage is the first one of the next step."""
        return bool(self.matrix) and (*self.matrix[-1], 0.0) == self.weights

    def evaluations(self, steps: int) -> int:
        """Evaluations of the field that ``steps`` steps of one interval cost."""
        stages = len(self.weights)
        return 1 + steps * (stages - 1) if self.reuses_last_stage else steps * stages

    def step(self, velocity: Velocity, x: Tensor, t: Tensor, h: Tensor, first: Tensor, memory: Tensor | None) -> Step:
        """One step; see `mfd_fast.solvers.base.Solver.step`."""
        width = expand_times(h, x)
        stages = [first]
        increment = None
        for node, row in zip(self.nodes, self.matrix, strict=True):
            increment = width * _combine(row, stages)
            stages.append(velocity(x + increment, t + node * h))
        reuse = self.reuses_last_stage and increment is not None
        if not reuse or increment is None:
            increment = width * _combine(self.weights, stages)
        error = width * _combine(self.error_weights, stages) if self.error_weights else None
        return Step(increment, stages[-1] if reuse else None, error, None)


def _combine(weights: tuple[float, ...], stages: list[Tensor]) -> Tensor:
    """The weighted sum of the stages; zero weights cost nothing."""
    total: Tensor | None = None
    for weight, stage in zip(weights, stages, strict=True):
        if weight == 0.0:
            continue
        scaled = stage if weight == 1.0 else weight * stage
        total = scaled if total is None else total + scaled
    if total is None:
        raise ValueError("a stage needs at least one non-zero weight")
    return total
