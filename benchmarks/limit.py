"""What the compiled copy of a network can do at its best batch size, without any planning around it."""

import torch
from torch import nn

from clock import cpu_seconds
from mfd_fast.rollout.compiled import compiled_field

BATCHES = (32, 64, 96, 128)


def best_per_row(network: nn.Module, batches: tuple[int, ...] = BATCHES, repeats: int = 4) -> float:
    """Least CPU seconds of one row of ``network`` compiled as rollouts use it, over batch sizes."""
    field = compiled_field(network)
    generator = torch.Generator().manual_seed(0)
    best = float("inf")
    for rows in batches:
        x, t = torch.randn(rows, 1, 8, 8, generator=generator), torch.rand(rows, generator=generator)
        label = torch.randint(10, (rows,), generator=generator)
        with torch.no_grad():
            field(x, t, label=label)
            taken = cpu_seconds(lambda x=x, t=t, label=label: field(x, t, label=label), repeats)
        best = min(best, taken / rows)
    return best
