"""Low-rank roles on small networks, and rows for them."""

import torch
from torch import Tensor, nn

from mfd_fast.models import build_model
from mfd_fast.models.lora import LoRARoles
from mfd_fast.types import RowGroup

SHAPE = (1, 4, 4)


def teacher(name: str = "mlp") -> nn.Module:
    torch.manual_seed(0)
    options = {"mlp": {"width": 16, "depth": 2}, "dit": {"width": 16, "depth": 1, "heads": 2}}[name]
    model = build_model(name, SHAPE, 3, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def roles_on(module: nn.Module, *, trained: bool = True, targets: list[str] | None = None) -> LoRARoles:
    roles = LoRARoles(module, rank=4, alpha=8.0, targets=targets)
    if trained:
        torch.manual_seed(1)
        with torch.no_grad():
            for role in roles.roles:
                for parameter in roles.parameters(role):
                    parameter.copy_(0.3 * torch.randn_like(parameter))
    return roles


def inputs(rows: int, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, *SHAPE, generator=generator)
    return x, torch.rand(rows, generator=generator), torch.randint(4, (rows,), generator=generator)


def groups_of(roles: LoRARoles, rows: list[tuple[str, int]]) -> list[RowGroup]:
    made = []
    for seed, (role, count) in enumerate(rows):
        x, t, label = inputs(count, seed)
        made.append(RowGroup(getattr(roles, role), x, t, {"label": label}))
    return made
