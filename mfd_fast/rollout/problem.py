"""One integration with everything resolved."""

from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast.rollout.checks import Times
from mfd_fast.types import Condition, VelocityField


class Problem(NamedTuple):
    """One integration with everything resolved."""

    field: VelocityField
    condition: Condition
    x: Tensor
    """The state in its own dtype (float32 or float64)."""
    times: Times
    field_dtype: torch.dtype
    cost: int
    """Network rows that one evaluation of the field computes."""
