"""The MLP against its formula."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from mfd_fast.models.mlp import MLP


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def test_forward_is_the_formula() -> None:
    torch.manual_seed(0)
    model = MLP((2, 3), 4, width=10, depth=2, block_width=6, condition_width=8).double()
    torch.nn.init.normal_(model.leave.weight)
    x, t, label = torch.randn(5, 2, 3).double(), torch.rand(5).double(), torch.tensor([0, 1, 2, 3, 4])
    weight = dict(model.named_parameters())
    condition = model.condition.time_in(model.condition.time_features(t)) + weight["condition.label.weight"][label]
    condition = silu(model.condition.out(silu(condition)))
    modulation = model.modulation(condition).reshape(5, 2, 2, 6)  # [B, depth, scale and shift, block_width]
    hidden = model.enter(x.reshape(5, 6))
    for i in range(2):
        scale, shift = modulation[:, i].unbind(1)
        inner = standardised(hidden) @ weight[f"block_in.{i}.weight"].T
        inner = silu(inner * (1 + scale) + shift)
        hidden = hidden + inner @ weight[f"block_out.{i}.weight"].T + weight[f"block_out.{i}.bias"]
    torch.testing.assert_close(model(x, t, label), model.leave(standardised(hidden)).reshape(5, 2, 3))


def test_half_of_the_width_is_modulated_by_default() -> None:
    model = MLP((2,), width=10)
    assert model.options["block_width"] == 5
    assert model.modulation.out_features == 2 * 3 * 5
