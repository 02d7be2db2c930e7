"""The keyword arguments that `mean_velocity`, `integrate` and `mean_velocity_pair` share, for type checkers.

What the three return depends on ``return_stats``; their overloads say so, and take everything else from here.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from mfd_fast.types import Condition


class Keywords(TypedDict, total=False):
    """Keyword arguments of `mean_velocity` and `integrate` but ``return_stats``; their docstring explains them."""

    step_size: float | None
    steps: int | None
    solver: str
    rtol: float | None
    atol: float | None
    max_evaluations: int | None
    max_rows: int | None
    condition: Condition | None
    negative_condition: Condition | None
    guidance_scale: float | Tensor
    guidance_interval: Sequence[float] | None
    negative_every: int
    field_dtype: torch.dtype | None
    runner: str
    differentiable: bool
    check_finite: bool


class PairKeywords(Keywords, total=False):
    """Keyword arguments of `mean_velocity_pair` but ``return_stats``."""

    auxiliary_solver: str | None
    auxiliary_step_size: float | None
