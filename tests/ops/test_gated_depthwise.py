"""The gated depthwise convolution against its formula, pixel by pixel."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from mfd_fast.ops.gated_depthwise import silu_depthwise_gate


def by_formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _, height, width, channels = x.shape
    mixed = bias.expand(x.shape).clone()
    for row in range(height):
        for column in range(width):
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    if 0 <= row + down < height and 0 <= column + right < width:
                        there = silu(x[:, row + down, column + right])
                        mixed[:, row, column] += there * weight[:, 0, down + 1, right + 1]
    return mixed[..., : channels // 2] * silu(mixed[..., channels // 2 :])


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 8), (1, 4, 1, 6)])
def test_is_the_formula(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(shape[-1], 1, 3, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    torch.testing.assert_close(silu_depthwise_gate(x, weight, bias), by_formula(x, weight, bias))
