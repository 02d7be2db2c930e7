"""A small network to record, and what it gives with and without."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mfd_fast
from mfd_fast.intervals import Uniform, sample_pairs


class Network(nn.Module):
    """Like any small network: weights, a buffer, a class label, a shared and a nested condition, dropout."""

    forwards = 0

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.enter, self.leave = nn.Linear(7, 16), nn.Linear(16, 6)
            self.label = nn.Embedding(4, 16)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("shift", torch.full((16,), 0.1))
        self.to(dtype)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, extra: Any = None) -> Tensor:
        Network.forwards += 1
        self.counted = getattr(self, "counted", 0) + 1  # which is no reason to record it again
        hidden = torch.tanh(self.enter(torch.cat([x, t[:, None].to(x.dtype)], 1)) + self.label(label) + self.shift)
        if extra is not None:
            hidden = hidden + extra["shared"] * extra["row"][:, None] * extra["factor"]
        return self.leave(self.dropout(hidden))


def problem(rows: int = 9, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator).to(dtype)
    t, r = sample_pairs(Uniform(), rows, generator=generator)
    r[0] = t[0]
    return x, t, r, {"label": torch.randint(0, 3, (rows,), generator=generator)}


def both(field: Callable[..., Tensor], *, rows: int = 9, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    x, t, r, condition = problem(rows, seed)
    options = {"condition": condition, "step_size": 0.1, "return_stats": True} | options
    eager, found = (
        mfd_fast.mean_velocity(field, x, t, r, runner=runner, **options) for runner in ("eager", "captured")
    )
    return eager, found


def assert_equal(field: Callable[..., Tensor], **options: Any) -> Tensor:
    (eager, expected), (found, stats) = both(field, **options)
    assert (stats.runner, stats.reason) == ("captured", "asked for")
    for name in ("evaluations", "steps", "status"):
        assert torch.equal(getattr(stats, name), getattr(expected, name)), name
    precision = 1e-12 if found.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found, eager, rtol=precision, atol=precision)
    return found


GUIDED = {"negative_condition": {"label": torch.tensor([3])}, "guidance_scale": 4.5}


def data_copy(network: Network) -> None:
    for parameter in network.parameters():
        parameter.data.copy_(0.5 * parameter.data)
