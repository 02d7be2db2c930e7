"""Datasets by name, and what a dataset refuses to be."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mfd_fast.data import DATASETS, Dataset, load_dataset

PARTS: dict[str, Any] = {
    "name": "made-up",
    "x": torch.zeros(5, 2),
    "label": torch.tensor([0, 1, 2, 0, 1]),
    "held_out_x": torch.zeros(3, 2),
    "held_out_label": torch.tensor([0, 1, 2]),
    "num_classes": 3,
}


def test_sample_shape() -> None:
    assert Dataset(**PARTS).sample_shape == (2,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(5, 2, dtype=torch.float64)}, TypeError, "x: expected float32"),
        ({"x": torch.zeros(5)}, ValueError, r"x: expected shape \[N, ...\]"),
        ({"held_out_x": torch.zeros(3, 4)}, ValueError, "held_out_x: expected samples of shape"),
        ({"label": torch.zeros(5)}, TypeError, "label: expected int64"),
        ({"label": torch.zeros(4, dtype=torch.int64)}, ValueError, r"label: expected shape \[5\]"),
        ({"label": torch.full((5,), 3)}, ValueError, r"label: expected labels in \[0, 3\)"),
        ({"held_out_label": torch.tensor([0, -1, 2])}, ValueError, "held_out_label: expected labels in"),
        ({"label": None}, ValueError, "labels and num_classes come together"),
        ({"num_classes": None}, ValueError, "labels and num_classes come together"),
        ({"conditions": {"past": torch.zeros(4)}}, ValueError, "conditions: expected 5 rows of 'past', .* got 4"),
        ({"conditions": {"past": torch.zeros(5)}}, ValueError, r"held_out_conditions: expected the names .*\(past\)"),
    ],
    ids=[
        "dtype",
        "shape",
        "held-out",
        "label-dtype",
        "label-rows",
        "label-high",
        "label-low",
        "no-label",
        "no-classes",
        "condition-rows",
        "condition-names",
    ],
)
def test_parts_that_do_not_fit(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Dataset(**(PARTS | change))


def test_unknown_dataset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown dataset 'digit'; did you mean 'digits'"):
        load_dataset("digit")


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match="unknown option of dataset 'mixture-2d' 'num_sample'; did you mean 'num_samples'"
    ):
        load_dataset("mixture-2d", num_sample=5)
    with pytest.raises(ValueError, match="no option of dataset 'digits' takes the name 'size'"):
        load_dataset("digits", size=5)


def test_root_of_a_dataset_without_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="root: dataset 'digits' has no files"):
        load_dataset("digits", tmp_path)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"cifar10", "npz", "occupancy", "prompts"}))
def test_registered_name_is_the_name_of_the_dataset(name: str) -> None:
    assert load_dataset(name).name == name
