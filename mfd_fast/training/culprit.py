"""Which sample made an update non-finite: found by computing parts of its batch once more, only after it happened."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mfd_fast.streams import RowDraws, Share

ShareLoss = Callable[[Share], tuple[Tensor, RowDraws]]
"""The loss of some rows of the batch, with its graph, and what its random numbers came from."""


class Culprit(NamedTuple):
    """What was found out about an update that was skipped."""

    what: str
    """``loss``, ``gradient`` or ``weight NAME``; ``batch`` when no sample alone repeats it."""
    row: int | None = None
    """First offending row of the global batch."""
    t: float | None = None
    """Its time."""

    @property
    def words(self) -> str:
        """A part of a sentence."""
        if self.what.startswith("weight"):
            return f"{self.what} is not finite"
        if self.row is None:
            return "no sample alone repeats it: the sum over the batch, or its loss scale, was too large"
        return f"the {self.what} of sample {self.row}" + ("" if self.t is None else f" at t = {self.t:.4g}")


def find_culprit(
    shares: Sequence[Share], named_parameters: Sequence[tuple[str, nn.Parameter]], loss: ShareLoss
) -> Culprit:
    """The first row of ``shares`` whose loss or gradient is not finite, by halving.

    Weights should be those of the update. User code that is random or looks at other rows of the batch may not repeat
    itself.
    """
    for name, parameter in named_parameters:
        if not bool(parameter.isfinite().all()):
            return Culprit(f"weight {name}")
    parameters = [parameter for _, parameter in named_parameters]

    def examine(share: Share) -> tuple[str | None, float | None]:
        value, draws = loss(share)
        t = None if draws.t is None else float(draws.t[0])
        if not bool(value.isfinite()):
            return "loss", t
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        bad = any(not bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
        return ("gradient" if bad else None), t

    for share in shares:
        if examine(share)[0] is not None:
            low, high = share.first, share.first + share.rows
            while high - low > 1:
                middle = (low + high) // 2
                if examine(Share(share.total, low, middle - low))[0] is not None:
                    high = middle
                else:
                    low = middle
            what, t = examine(Share(share.total, low, 1))
            if what is not None:
                return Culprit(what, low, t)
    return Culprit("batch")
