"""The parts of the transformer."""

import torch

from mfd_fast.models.dit import HeadNorm, from_patches, patch_grid, position_embedding, to_patches


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
