"""The Inception network of published Fréchet distances (FID), for its weights of 2015-12-05 as ported to PyTorch.

Source: Szegedy et al., arXiv 1512.00567; Heusel et al., arXiv 1706.08500, whose TensorFlow graph differs from other
Inception v3 networks: average pools leave the padding out, the last block pools by maximum, 1008 outputs. Modules are
called as in the port's file ``pt_inception-2015-12-05-6726825d.pth``.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Link = tuple[str, int, int | tuple[int, int], int]
"""A convolution of a chain: name, outputs, kernel, stride."""

SIDE = 299
FEATURES = 2048


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if padded else 0
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, outputs, H', W']``."""
        return F.relu(self.bn(self.conv(x)))


def resized(pictures: Tensor) -> Tensor:
    """``[B, 3, H, W]`` at the network's size, bilinear between pixel centres as FID is usually computed."""
    return F.interpolate(pictures, (SIDE, SIDE), mode="bilinear", align_corners=False)


def average(x: Tensor) -> Tensor:
    """The mean of the neighbours that are there: padding does not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def largest(x: Tensor) -> Tensor:
    """The largest of the neighbours."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x: Tensor) -> Tensor:
    """The largest of each neighbourhood, at every second place."""
    return F.max_pool2d(x, 3, stride=2)


class Mixed(nn.Module):
    """Chains of convolutions side by side, their results concatenated, last the pooled input.

    A link whose name ends in a and the one that ends in b are applied to the same input.
    """

    def __init__(self, inputs: int, chains: Sequence[Sequence[Link]], pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool, self.names = pool, [[name for name, *_ in chain] for chain in chains]
        for chain in chains:
            width = inputs
            for name, outputs, kernel, stride in chain:
                setattr(self, name, ConvNorm(width, outputs, kernel, stride, padded=stride == 1))
                width = width if name.endswith("a") else outputs

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to the concatenation ``[B, outputs, H', W']``."""
        results = [self._chain(names, self.pool(x) if names == ["branch_pool"] else x) for names in self.names]
        return torch.cat(results if ["branch_pool"] in self.names else [*results, self.pool(x)], 1)

    def _chain(self, names: list[str], x: Tensor) -> Tensor:
        fork = next((i for i, name in enumerate(names) if name.endswith("a")), len(names))
        for name in names[:fork]:
            x = getattr(self, name)(x)
        return torch.cat([getattr(self, name)(x) for name in names[fork:]], 1) if names[fork:] else x


def mixed_35(inputs: int, pooled: int) -> Mixed:
    """The block for 35 x 35 places."""
    return Mixed(
        inputs,
        [
            [("branch1x1", 64, 1, 1)],
            [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)],
            [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)],
            [("branch_pool", pooled, 1, 1)],
        ],
        average,
    )


def mixed_17(width: int) -> Mixed:
    """The block for 17 x 17 places; ``width`` of its long kernels."""
    row, column = (1, 7), (7, 1)
    double: list[Link] = [
        ("branch7x7dbl_1", width, 1, 1),
        ("branch7x7dbl_2", width, column, 1),
        ("branch7x7dbl_3", width, row, 1),
        ("branch7x7dbl_4", width, column, 1),
        ("branch7x7dbl_5", 192, row, 1),
    ]
    return Mixed(
        768,
        [
            [("branch1x1", 192, 1, 1)],
            [("branch7x7_1", width, 1, 1), ("branch7x7_2", width, row, 1), ("branch7x7_3", 192, column, 1)],
            double,
            [("branch_pool", 192, 1, 1)],
        ],
        average,
    )


def mixed_8(inputs: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    """The block for 8 x 8 places."""
    row, column = (1, 3), (3, 1)
    double: list[Link] = [("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 1)]
    return Mixed(
        inputs,
        [
            [("branch1x1", 320, 1, 1)],
            [("branch3x3_1", 384, 1, 1), ("branch3x3_2a", 384, row, 1), ("branch3x3_2b", 384, column, 1)],
            [*double, ("branch3x3dbl_3a", 384, row, 1), ("branch3x3dbl_3b", 384, column, 1)],
            [("branch_pool", 192, 1, 1)],
        ],
        pool,
    )


class Inception(nn.Module):
    """Pictures ``[B, 3, 299, 299]`` in [0, 1] to features ``[B, 2048]`` (the last average pool)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 2, padded=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_35(192, 32), mixed_35(256, 64), mixed_35(288, 64)
        double: list[Link] = [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)]
        self.Mixed_6a = Mixed(288, [[("branch3x3", 384, 3, 2)], double], halve)
        self.Mixed_6b, self.Mixed_6c = mixed_17(128), mixed_17(160)
        self.Mixed_6d, self.Mixed_6e = mixed_17(160), mixed_17(192)
        long: list[Link] = [
            ("branch7x7x3_1", 192, 1, 1),
            ("branch7x7x3_2", 192, (1, 7), 1),
            ("branch7x7x3_3", 192, (7, 1), 1),
            ("branch7x7x3_4", 192, 3, 2),
        ]
        short: list[Link] = [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)]
        self.Mixed_7a = Mixed(768, [short, long], halve)
        self.Mixed_7b, self.Mixed_7c = mixed_8(1280, average), mixed_8(2048, largest)
        self.fc = nn.Linear(FEATURES, 1008)  # of the file; features are taken before it

    def forward(self, pictures: Tensor) -> Tensor:
        """The features."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * pictures - 1)))
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x))))
        for name, block in self.named_children():
            x = block(x) if name.startswith("Mixed") else x
        features: Tensor = x.mean((2, 3))
        return features
