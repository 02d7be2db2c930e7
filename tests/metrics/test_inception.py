"""The network of FID against plain restatements of its blocks, and its way through `evaluate`."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny_models import build
from torch import Tensor, nn

from mfd_fast.metrics.inception import Inception, Mixed, average, largest, mixed_8, mixed_17, mixed_35, resized
from mfd_fast.metrics.model_sources import find_source
from mfd_fast.metrics.text_image import METRICS

PLACES = {"Mixed_5b": (256, 35), "Mixed_5d": (288, 35), "Mixed_6a": (768, 17), "Mixed_6e": (768, 17),
          "Mixed_7a": (1280, 8), "Mixed_7b": (2048, 8), "Mixed_7c": (2048, 8)}  # fmt: skip


def spread(module: nn.Module) -> nn.Module:
    """Norms that do something: random means, variances, scales and shifts."""
    generator = torch.Generator().manual_seed(3)
    for name, value in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return module.double().eval()


def applied(module: nn.Module, name: str, x: Tensor, padding: tuple[int, int] = (0, 0), stride: int = 1) -> Tensor:
    """Convolution, normalised by hand, ReLU."""
    part = getattr(module, name)
    x = F.conv2d(x, part.conv.weight, stride=stride, padding=padding)
    norm = part.bn
    scale = norm.weight / (norm.running_var + 1e-3).sqrt()
    return (x * scale[:, None, None] + (norm.bias - norm.running_mean * scale)[:, None, None]).clamp_min(0)


def chain(module: nn.Module, x: Tensor, *links: tuple[str, int, int]) -> Tensor:
    for name, rows, columns in links:
        x = applied(module, name, x, (rows, columns))
    return x


def pooled(x: Tensor) -> Tensor:
    """The mean over the neighbours that are there."""
    ones = torch.ones_like(x[:, :1])
    kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype)
    total = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).reshape(x.shape)
    return total / F.conv2d(ones, kernel, padding=1)


def test_the_block_for_35_places() -> None:
    block, x = spread(build(lambda: mixed_35(8, 5), 0)), torch.randn(2, 8, 6, 7, dtype=torch.float64)
    expected = [
        chain(block, x, ("branch1x1", 0, 0)),
        chain(block, x, ("branch5x5_1", 0, 0), ("branch5x5_2", 2, 2)),
        chain(block, x, ("branch3x3dbl_1", 0, 0), ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 1, 1)),
        chain(block, pooled(x), ("branch_pool", 0, 0)),
    ]
    torch.testing.assert_close(block(x), torch.cat(expected, 1))


def test_the_block_for_17_places() -> None:
    block, x = spread(build(lambda: mixed_17(6), 1)), torch.randn(1, 768, 8, 9, dtype=torch.float64)
    double = [(f"branch7x7dbl_{i}", *pad) for i, pad in enumerate([(0, 0), (3, 0), (0, 3), (3, 0), (0, 3)], 1)]
    expected = [
        chain(block, x, ("branch1x1", 0, 0)),
        chain(block, x, ("branch7x7_1", 0, 0), ("branch7x7_2", 0, 3), ("branch7x7_3", 3, 0)),
        chain(block, x, *double),
        chain(block, pooled(x), ("branch_pool", 0, 0)),
    ]
    torch.testing.assert_close(block(x), torch.cat(expected, 1))


@pytest.mark.parametrize("pool", [average, largest])
def test_the_block_for_8_places(pool: object) -> None:
    block, x = spread(build(lambda: mixed_8(12, pool), 2)), torch.randn(2, 12, 5, 4, dtype=torch.float64)  # type: ignore[arg-type]
    one = chain(block, x, ("branch3x3_1", 0, 0))
    two = chain(block, x, ("branch3x3dbl_1", 0, 0), ("branch3x3dbl_2", 1, 1))
    beside = pooled(x) if pool is average else F.max_pool2d(x, 3, 1, 1)
    expected = [
        chain(block, x, ("branch1x1", 0, 0)),
        *(chain(block, one, (f"branch3x3_2{side}", *pad)) for side, pad in (("a", (0, 1)), ("b", (1, 0)))),
        *(chain(block, two, (f"branch3x3dbl_3{side}", *pad)) for side, pad in (("a", (0, 1)), ("b", (1, 0)))),
        chain(block, beside, ("branch_pool", 0, 0)),
    ]
    torch.testing.assert_close(block(x), torch.cat(expected, 1))


def test_the_whole_network() -> None:
    network = build(Inception, 0).eval()
    assert sum(weight.numel() for weight in network.parameters()) == 23_850_960
    seen = {}
    for name, block in network.named_children():
        if isinstance(block, Mixed):
            block.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.shape[1:]}))
    with torch.no_grad():
        features = network(resized(torch.rand(2, 3, 40, 30)))
    assert features.shape == (2, 2048)
    assert {name: (shape[0], shape[1]) for name, shape in seen.items() if name in PLACES} == PLACES
    assert network.Mixed_7b.pool is average
    assert network.Mixed_7c.pool is largest


def test_resizing_is_between_pixel_centres() -> None:
    ramp = torch.arange(13.0).expand(1, 1, 13, 13)
    row = resized(ramp)[0, 0, 0]
    centres = ((torch.arange(299) + 0.5) * 13 / 299 - 0.5).clamp(0, 12)
    torch.testing.assert_close(row, centres, rtol=1e-5, atol=1e-5)


def test_features_of_pictures(tmp_path: Path) -> None:
    """From a file of weights, whatever the sizes and modes of the pictures; each as alone."""
    (tmp_path / "inception").mkdir()
    network = build(Inception, 4).eval()
    save_file(network.state_dict(), tmp_path / "inception" / "inception.safetensors")
    pixels = [np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), dtype=np.uint8) for seed in range(2)]
    pictures = [*map(Image.fromarray, pixels), Image.fromarray(pixels[0]).convert("L")]
    with torch.no_grad():
        features = METRICS["inception"].load(find_source("inception", tmp_path), torch.device("cpu"))(pictures, [])
        for row, values in zip(features, pixels, strict=False):
            x = torch.from_numpy(values / 255).float().permute(2, 0, 1)[None]
            torch.testing.assert_close(row, network(resized(x))[0], rtol=1e-3, atol=1e-5)
    assert METRICS["inception"].gives_features
    assert (features[0] - features[2]).abs().max() > 1e-3


def test_missing_and_wrong_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pt_inception-2015-12-05.*--models"):
        METRICS["inception"].load(find_source("inception"), torch.device("cpu"))
    (tmp_path / "inception").mkdir()
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "inception" / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not fit the model"):
        METRICS["inception"].load(find_source("inception", tmp_path), torch.device("cpu"))
