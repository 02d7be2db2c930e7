"""Fixtures that several test folders share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast.data import load_dataset
from mfd_fast.methods.mfd import flow_matching_loss
from mfd_fast.models import build_model
from mfd_fast.models.base import VelocityNetwork


@pytest.fixture(scope="session")
def digits_teacher() -> VelocityNetwork:
    """A small class-conditional network, trained on the digits for a few seconds; frozen: leave it as it is."""
    digits = load_dataset("digits")
    assert digits.label is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model("mlp", digits.sample_shape, digits.num_classes, width=128, depth=2)
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        for _ in range(300):
            index = torch.randint(len(digits.x), (128,))
            label = digits.label[index].masked_fill(torch.rand(128) < 0.1, 10)
            noise, t = torch.randn(128, *digits.sample_shape), torch.rand(128)
            loss = flow_matching_loss(network, digits.x[index], noise, t, {"label": label})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.requires_grad_(False)


class WatchedField:
    """A field that remembers what it was asked; every row must carry its number in the condition ``row``."""

    def __init__(self, field: Callable[..., Tensor]) -> None:
        self._field = field
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        """(x, t, row) of each call."""

    def __call__(self, x: Tensor, t: Tensor, *, row: Tensor, **condition: Any) -> Tensor:
        self.calls.append((x.detach().clone(), t.detach().clone(), row.clone()))
        return self._field(x, t, **condition)

    def evaluations(self, rows: int) -> list[int]:
        """How often each row was computed."""
        return torch.bincount(torch.cat([row for _, _, row in self.calls]), minlength=rows).tolist()

    def times(self, row: int) -> list[float]:
        """The times at which a row was computed, in order."""
        return [float(time) for _, t, rows in self.calls for time in t[rows == row]]


@pytest.fixture(scope="session")
def watched() -> type[WatchedField]:
    """The class of fields that remember what they were asked."""
    return WatchedField
