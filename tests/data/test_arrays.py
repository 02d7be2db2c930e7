"""Samples of a user's own from an npz file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mfd_fast.data import load_dataset

ROWS = 40


def arrays(**changed: Any) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    usual = {
        "x": draw.normal(size=(ROWS, 3, 5)),
        "label": draw.integers(0, 4, ROWS),
        "speed": draw.normal(size=(ROWS, 2)),
        "mask": draw.integers(0, 2, (ROWS, 7)).astype(bool),
        "token": draw.integers(0, 9, (ROWS, 6), dtype=np.int32),
    }
    return {name: value for name, value in (usual | changed).items() if value is not None}


def write(folder: Path, **changed: Any) -> Path:
    np.savez(folder / "mine.npz", **arrays(**changed))
    return folder / "mine.npz"


def test_every_array_goes_where_it_belongs(tmp_path: Path) -> None:
    given = arrays(label=np.arange(ROWS) % 4)
    dataset = load_dataset("npz", write(tmp_path, **given), held_out=0.25)
    assert dataset.name == "npz"
    assert dataset.sample_shape == (3, 5)
    assert (len(dataset.x), len(dataset.held_out_x)) == (30, 10)
    assert dataset.num_classes == 4
    assert dataset.value_range is None
    kinds = {name: rows.dtype for name, rows in dataset.conditions.items()}
    assert kinds == {"speed": torch.float32, "mask": torch.bool, "token": torch.int64}
    assert dataset.label is not None
    assert dataset.held_out_label is not None
    # Every row is there once, with what belongs to it.
    x = torch.cat([torch.as_tensor(dataset.x[:]), torch.as_tensor(dataset.held_out_x[:])])
    place = {tuple(row.flatten().tolist()): i for i, row in enumerate(torch.from_numpy(given["x"]).float())}
    order = [place[tuple(row.flatten().tolist())] for row in x]
    assert sorted(order) == list(range(ROWS))
    assert torch.equal(torch.cat([dataset.label, dataset.held_out_label]), torch.from_numpy(given["label"])[order])
    for name in kinds:
        rows = torch.cat([torch.as_tensor(part[name][:]) for part in (dataset.conditions, dataset.held_out_conditions)])
        assert torch.equal(rows, torch.from_numpy(given[name]).to(rows.dtype)[order]), name


def test_samples_alone_and_the_same_split_each_time(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("label", "speed", "mask", "token"))
    path = write(tmp_path, **nothing)
    first, again = load_dataset("npz", path), load_dataset("npz", path)
    assert first.label is None
    assert first.conditions == {}
    assert len(first.held_out_x) == 4
    assert torch.equal(torch.as_tensor(first.x[:]), torch.as_tensor(again.x[:]))


def test_pictures_of_bytes_are_scaled(tmp_path: Path) -> None:
    pixels = np.zeros((ROWS, 3, 4, 4), np.uint8)
    pixels[:, 1] = 255
    dataset = load_dataset("npz", write(tmp_path, x=pixels), pictures=True)
    assert dataset.value_range == (-1.0, 1.0)
    assert torch.as_tensor(dataset.x[:])[:, :, 0, 0].unique(dim=0).tolist() == [[-1.0, 1.0, -1.0]]


@pytest.mark.parametrize(
    ("changed", "options", "words"),
    [
        ({"x": None}, {}, r"has no array 'x', only label, mask, speed, token"),
        ({"x": np.zeros(ROWS)}, {}, r"'x' needs shape \[N, \.\.\.\] with at least two rows, got \[40\]"),
        ({"x": np.full((ROWS, 2), np.nan)}, {}, "'x' holds numbers that are not finite in float32"),
        ({"x": np.full((ROWS, 2), 1e300)}, {}, "'x' holds numbers that are not finite in float32"),
        ({"speed": np.zeros((ROWS - 1, 2))}, {}, r"'speed' needs 40 rows, as 'x' has, got shape \[39, 2\]"),
        ({"speed": np.float32(1)}, {}, r"'speed' needs 40 rows, as 'x' has, got shape \[\]"),
        ({"label": np.zeros(ROWS)}, {}, r"'label' needs \[N\] whole numbers from 0, got float64 of shape \[40\]"),
        ({"label": np.arange(ROWS) - 1}, {}, r"'label' needs \[N\] whole numbers from 0, got int64"),
        ({"label": np.arange(ROWS) + 1}, {}, "'label' numbers classes from 0, got 40 in 40 rows"),
        ({"speed": np.full(ROWS, np.inf)}, {}, "'speed' holds numbers that are not finite in float32"),
        ({}, {"pictures": True}, r"pictures need shape \[N, 1 or 3, H, W\], got \[40, 3, 5\]"),
        (
            {"x": np.full((ROWS, 1, 2, 2), 255.0)},
            {"pictures": True},
            r"pictures need values in \[-1, 1\], or uint8, got 255 to 255",
        ),
        ({}, {"held_out": 1.0}, "held_out: expected a share above 0 and below 1, got 1.0"),
        ({"speed": np.array(["a"] * ROWS)}, {}, r"speed\.npy: expected numbers"),
    ],
)
def test_what_does_not_fit_is_named(changed: Any, options: Any, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, **changed)
    with pytest.raises(ValueError, match=words) as caught:
        load_dataset("npz", path, **options)
    assert "held_out" in options or "mine.npz" in str(caught.value)


def test_there_must_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--set data\.root=FILE\.npz"):
        load_dataset("npz")
    with pytest.raises(FileNotFoundError, match=r"expected an npz file, .*none\.npz is none"):
        load_dataset("npz", tmp_path / "none.npz")
