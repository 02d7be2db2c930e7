"""The field as a rollout sees it: conditions follow the live rows, dtypes and shapes are kept."""

import torch
from torch import Tensor

from mfd_fast.guidance import check_velocity
from mfd_fast.rows import first_rows, select_rows
from mfd_fast.types import Condition, VelocityField


class RowEvaluator:
    """``evaluate(x, t)`` of the rows that are still live, in the dtype of the state."""

    def __init__(self, field: VelocityField, condition: Condition, rows: int, field_dtype: torch.dtype) -> None:
        self._field = field
        self._all = condition
        self._field_dtype = field_dtype
        self.keep_first(rows)

    def keep_first(self, rows: int) -> None:
        """From now on only the first ``rows`` rows are evaluated."""
        self._live = first_rows(self._all, rows)

    def select(self, index: Tensor) -> None:
        """From now on only the rows ``index`` of the present ones are evaluated, in that order."""
        self._all = select_rows(self._all, index)
        self.keep_first(index.shape[0])

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity of the live rows; x ``[n, ...]``, t ``[n]`` in the dtype of the state."""
        velocity = self._field(x.to(self._field_dtype), t, **self._live)
        return check_velocity(velocity, x.shape).to(x.dtype)
