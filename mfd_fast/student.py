"""The student: a few-step generator, from noise to samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mfd_fast.prepared_conditions import prepared
from mfd_fast.rows import check_rows, first_rows, map_tensors, select_rows
from mfd_fast.samplers import SAMPLERS, SamplerStep
from mfd_fast.streams import make_generator, standard_normal
from mfd_fast.types import Condition, VelocityField


@dataclass(frozen=True)
class Student:
    """Generates samples with one step ``x - (t - r) field(x, t)`` from noise to data, or a few.

    With ``gamma`` above 0 every step but the last goes beyond its end r and returns with fresh noise: to 0 for 1, as
    consistency models do, and to ``r sqrt(1 - gamma^2)`` in between (consistency trajectory models, arXiv 2310.02279).

    Attributes:
        field: the student's velocity network.
        sample_shape: shape of one sample.
        steps: network calls from noise to a sample.
        shift: time shift of the grid; 1 is equal steps.
        grad_steps: how many of the last steps are differentiated in training; None for all.
        label_counts: how often each label occurs in the training data, from which `sample` draws labels when it gets
            no condition; None without classes.
        device: where the network lives.
        gamma: share of fresh noise between the steps, 0 (none) to 1.
        second_time: whether the network gets the end r of its step, ``field(x, t, r=r)``.
        value_range: smallest and largest value of a picture, to which `sample` clips; None for other data.
        condition_names: conditions that `sample` must be given, because they come from data and cannot be drawn.
        sampler: a name in `mfd_fast.samplers.SAMPLERS`: "euler", or "dpm++" as diffusers' pipelines of SANA have it.
        checkpoint: compute each step again in backward instead of keeping what it computed: one step's memory for all.
    """

    field: VelocityField
    sample_shape: tuple[int, ...]
    steps: int = 1
    shift: float = 1.0
    grad_steps: int | None = None
    label_counts: tuple[int, ...] | None = None
    device: torch.device | str = "cpu"
    value_range: tuple[float, float] | None = None
    condition_names: tuple[str, ...] = ()
    gamma: float = 0.0
    second_time: bool = False
    sampler: str = "euler"
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.grad_steps is not None and not 1 <= self.grad_steps <= self.steps:
            raise ValueError(f"grad_steps must be None or lie in [1, steps={self.steps}], got {self.grad_steps}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {self.gamma}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if self.sampler != "euler" and (self.gamma > 0 or self.second_time):
            raise ValueError(f"gamma and second_time need sampler='euler', got {self.sampler!r}")

    def plan(self) -> list[SamplerStep]:
        """The steps from noise to data."""
        return SAMPLERS[self.sampler](self.steps, self.shift)

    def time_grid(self) -> list[float]:
        """The noise levels of the steps down to 0 (data), ``steps + 1`` numbers."""
        return [*(step.level for step in self.plan()), 0.0]

    def jump(self, x: Tensor, now: float, then: float, condition: Condition) -> Tensor:
        """One step ``[B, *sample_shape]`` from ``x`` at time ``now`` to time ``then``."""
        t, r = (torch.full((x.shape[0],), time, dtype=torch.float32, device=x.device) for time in (now, then))
        end = {"r": r} if self.second_time else {}
        return x - (now - then) * self._velocity(x, t, {**condition, **end})

    def _velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The velocity in the dtype of ``x``, computed again in backward where that is wanted."""
        rows = first_rows(condition, x.shape[0])
        if not (self.checkpoint and torch.is_grad_enabled()):
            return self.field(x, t, **rows).to(x.dtype)
        velocity: Tensor = checkpoint(self.field, x, t, use_reentrant=False, **rows)
        return velocity.to(x.dtype)

    def generate(
        self,
        noise: Tensor,
        condition: Condition,
        *,
        with_gradient: bool = False,
        fresh: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Samples ``[B, *sample_shape]`` float32 from ``noise`` of the same shape.

        Args:
            noise: standard normal.
            condition: rows of the network's condition.
            with_gradient: keep the graph of the last ``grad_steps`` steps.
            fresh: draws the noise of a step, like ``noise``; asked for between the steps if ``gamma`` is above 0.
        """
        grid = self.time_grid()
        free = self.steps - (self.grad_steps or self.steps) if with_gradient else self.steps
        with torch.set_grad_enabled(with_gradient):
            (condition,) = prepared([(self.field, condition)])
        if self.sampler != "euler":
            return self._multistep(noise, condition, free, with_gradient)
        x = noise
        for index, (now, then) in enumerate(pairwise(grid)):
            with torch.set_grad_enabled(with_gradient and index >= free):
                if self.gamma == 0 or then == 0:
                    x = self.jump(x, now, then, condition)
                    continue
                if fresh is None:
                    raise ValueError(f"gamma is {self.gamma}: a student of {self.steps} steps needs fresh noise")
                beyond, kept, added = renoising(then, self.gamma)
                x = kept * self.jump(x, now, beyond, condition) + added * fresh()
        return x

    def _multistep(self, noise: Tensor, condition: Condition, free: int, with_gradient: bool) -> Tensor:
        """Samples by the steps of `plan`; the first ``free`` of them leave no graph."""
        x = data = noise
        for index, step in enumerate(self.plan()):
            with torch.set_grad_enabled(with_gradient and index >= free):
                t = torch.full((x.shape[0],), step.time, dtype=torch.float32, device=x.device)
                velocity = self._velocity(x, t, condition)
                moved = step.keep * x + step.velocity * velocity + step.previous * data
                x, data = moved, x - step.level * velocity
        return x

    def draw_condition(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """Labels as frequent as in the training data, ``{"label": [n]}`` int64; empty without classes.

        Raises:
            ValueError: n is not positive, or the student needs conditions that only data can give.
        """
        if n < 1:
            raise ValueError(f"n must be positive, got {n}")
        if self.condition_names:
            raise ValueError(
                f"condition: this student needs {', '.join(self.condition_names)}, one row for each sample; got None"
            )
        if self.label_counts is None:
            return {}
        weights = torch.tensor(self.label_counts, dtype=torch.float64)
        generator = make_generator(seed, "sample/condition")
        return {"label": torch.multinomial(weights, n, replacement=True, generator=generator)}

    def sample(
        self,
        n: int,
        condition: Condition | None = None,
        seed: int = 0,
        batch_size: int = 1024,
        progress: Callable[[int], object] = lambda rows: None,
    ) -> Tensor:
        """``n`` samples ``[n, *sample_shape]`` float32 on the CPU; the same seed gives the same samples.

        Args:
            n: number of samples.
            condition: rows of the network's condition, leading dimension n or 1; None draws labels with the seed.
            seed: of noise and labels.
            batch_size: rows per network call.
            progress: told how many more rows there are.

        Raises:
            ValueError: n or batch_size is not positive, or the condition has another number of rows.
        """
        if n < 1 or batch_size < 1:
            raise ValueError(f"n and batch_size must be positive, got n={n}, batch_size={batch_size}")
        rows = self.draw_condition(n, seed) if condition is None else map_tensors(condition, Tensor.cpu)
        check_rows("condition", rows, n, torch.device("cpu"))
        shape = (n, *self.sample_shape)
        noise = standard_normal(shape, make_generator(seed, "sample/noise"))
        between = range(1, self.steps if self.gamma > 0 else 1)
        fresh = [standard_normal(shape, make_generator(seed, "sample/fresh", step)) for step in between]
        parts = []
        for first in range(0, n, batch_size):
            here = slice(first, first + batch_size)
            part = map_tensors(select_rows(rows, torch.arange(n)[here]), self._to_device)
            draws = (self._to_device(noise[here]) for noise in fresh)
            parts.append(self.generate(self._to_device(noise[here]), part, fresh=draws.__next__).cpu())
            progress(len(parts[-1]))
        samples = torch.cat(parts)
        return samples if self.value_range is None else samples.clamp(*self.value_range)

    def _to_device(self, value: Tensor) -> Tensor:
        return value.to(self.device)


def renoising(then: float, gamma: float) -> tuple[float, float, float]:
    """How far beyond ``then`` a step goes, and the weights of its end and of fresh noise: ``x = kept x' + added e``.

    The marginal of time ``then`` is met exactly. (The code of arXiv 2510.24474 adds ``1 - kept`` instead, which is the
    same for gamma = 1 and too little noise in between.)
    """
    beyond = then * math.sqrt(1 - gamma**2)
    kept = (1 - then) / (1 - beyond)
    return beyond, kept, math.sqrt(then**2 - (kept * beyond) ** 2)
