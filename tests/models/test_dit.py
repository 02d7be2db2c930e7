"""The parts of the transformer."""

import pytest
import torch
from torch.nn import functional

from mfd_fast.models.dit import HeadNorm, from_patches, gelu_tanh, patch_grid, position_embedding, to_patches


def test_patches_are_squares_and_put_back() -> None:
    x = torch.randn(2, 3, 6, 4)
    grid = patch_grid((3, 6, 4), 2)
    patches = to_patches(x, grid)
    assert grid == (3, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 3].reshape(3, 2, 2), x[1, :, 2:4, 2:4])
    assert torch.equal(from_patches(patches, grid, (3, 6, 4)), x)


def test_positions_differ_by_row_and_column() -> None:
    position = position_embedding(3, 5, 16).reshape(3, 5, 16)
    assert torch.equal(position[:, :1, :8].expand(3, 5, 8), position[..., :8])
    assert torch.equal(position[:1, :, 8:].expand(3, 5, 8), position[..., 8:])
    assert torch.cdist(position.flatten(0, 1), position.flatten(0, 1)).fill_diagonal_(1.0).min() > 0.1


def test_head_norm_gives_rows_of_unit_size() -> None:
    norm = HeadNorm(8)
    x = 5 * torch.randn(4, 8)
    torch.testing.assert_close(norm(x).square().mean(1), torch.ones(4))
    torch.testing.assert_close(norm(3 * x), norm(x))
    norm.gain.data[2] = 7.0
    torch.testing.assert_close(norm(x)[:, 2], 7 * x[:, 2] / x.square().mean(1).sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_compiled_is_that_of_torch(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-12, 12, 101), torch.tensor([0.0, 1e-20, 60.0, -60.0])]).to(dtype)
    compiled = torch.compile(gelu_tanh, backend="eager")(x.double())
    exact = functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(compiled, exact, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gelu_tanh(x), functional.gelu(x, approximate="tanh"))
