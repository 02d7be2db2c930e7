"""torchdiffeq as a solver, for cross-checking: ``solver="torchdiffeq:dopri5"``.

Each row's interval is rescaled to [0, 1], so the whole batch takes the same steps (lock-step): rows get the numbers of
their own interval, but the work of the widest one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfd_fast.path import expand_times
from mfd_fast.solvers.base import Velocity

PREFIX = "torchdiffeq:"
FIXED_METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")
ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


@dataclass(frozen=True)
class TorchdiffeqSolver:
    """One of torchdiffeq's methods."""

    method: str

    def __post_init__(self) -> None:
        if self.method not in FIXED_METHODS + ADAPTIVE_METHODS:
            raise ValueError(
                f"solver 'torchdiffeq:<method>' takes one of {', '.join(FIXED_METHODS + ADAPTIVE_METHODS)}, "
                f"got {self.method!r}"
            )

    @property
    def error_order(self) -> int | None:
        """Not None for methods that control their error; the number itself is torchdiffeq's business."""
        return None if self.method in FIXED_METHODS else 0

    def solve(
        self,
        velocity: Velocity,
        x: Tensor,
        t: Tensor,
        r: Tensor,
        *,
        steps: int | None,
        rtol: float,
        atol: float,
        max_step: float,
    ) -> Tensor:
        """The displacement x(r) - x(t) of every row.

        Args:
            velocity: the field with its conditions.
            x: ``[n, ...]``, the state at t.
            t: ``[n]``, start of each row.
            r: ``[n]``, end of each row.
            steps: number of equal steps of fixed-step methods; adaptive methods ignore it.
            rtol: relative tolerance of adaptive methods.
            atol: absolute tolerance of adaptive methods.

            max_step: largest step in units of time of adaptive methods.

        Raises:
            ModuleNotFoundError: torchdiffeq is not installed.
            RuntimeError: an adaptive method gave up.
        """
        try:
            from torchdiffeq import odeint
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"solver 'torchdiffeq:{self.method}' needs torchdiffeq: pip install 'mfd_fast[peers]'"
            ) from error
        width = r - t
        scale = expand_times(width, x)
        low, high = torch.minimum(t, r), torch.maximum(t, r)

        def rescaled(s: Tensor, y: Tensor) -> Tensor:
            return scale * velocity(x + y, (t + s.to(t) * width).clamp(low, high))

        def equal_steps(function: Any, y: Tensor, ends: Tensor) -> Tensor:
            return torch.linspace(0, 1, (steps or 1) + 1, dtype=ends.dtype, device=ends.device)

        options: dict[str, Any] = {"grid_constructor": equal_steps}
        if self.method not in FIXED_METHODS:
            options = {"max_step": max_step / float(width.detach().abs().max())}
        grid = torch.tensor([0.0, 1.0], dtype=x.dtype, device=x.device)
        start = torch.zeros_like(x)
        try:
            path: Tensor = odeint(rescaled, start, grid, method=self.method, rtol=rtol, atol=atol, options=options)
        except AssertionError as error:
            raise RuntimeError(f"solver 'torchdiffeq:{self.method}' gave up: {error}") from error
        return path[-1]
