"""Rows of conditions."""

from typing import Any

import numpy as np
import pytest
import torch

from mfd_fast.rows import can_concatenate, check_rows, concatenate, first_rows, map_tensors, select_rows

CPU = torch.device("cpu")


def _condition() -> dict[str, Any]:
    return {
        "label": torch.tensor([3, 1, 2]),
        "shared": torch.ones(1, 2),
        "nested": {"text": torch.arange(6).view(3, 2), "deeper": {"mask": torch.tensor([True, False, True])}},
        "scale": 2.0,
        "name": "plain",
        "nothing": None,
    }


def test_select_rows() -> None:
    chosen = select_rows(_condition(), torch.tensor([2, 0]))
    assert chosen["label"].tolist() == [2, 3]
    assert chosen["shared"].tolist() == [[1.0, 1.0]]
    assert chosen["nested"]["text"].tolist() == [[4, 5], [0, 1]]
    assert chosen["nested"]["deeper"]["mask"].tolist() == [True, True]
    assert (chosen["scale"], chosen["name"], chosen["nothing"]) == (2.0, "plain", None)


def test_first_rows() -> None:
    condition = _condition()
    first = first_rows(condition, 2)
    assert first["label"].tolist() == [3, 1]
    assert first["shared"].shape == (2, 2)
    assert first["nested"]["deeper"]["mask"].tolist() == [True, False]
    assert first["label"].data_ptr() == condition["label"].data_ptr(), "rows are views"
    assert first_rows({"label": torch.tensor([7])}, 3)["label"].tolist() == [7, 7, 7]
    assert first_rows(condition, 0)["shared"].shape == (0, 2)


def test_map_tensors_leaves_the_original_alone() -> None:
    condition = _condition()
    doubled = map_tensors(condition, lambda value: value * 2)
    assert doubled["nested"]["text"].tolist() == [[0, 2], [4, 6], [8, 10]]
    assert condition["nested"]["text"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert list(doubled) == list(condition)


def test_concatenate() -> None:
    condition = first_rows(_condition(), 3)
    both = concatenate([condition, select_rows(condition, torch.tensor([1]))])
    assert both["label"].tolist() == [3, 1, 2, 1]
    assert both["nested"]["deeper"]["mask"].tolist() == [True, False, True, False]
    assert both["scale"] == 2.0


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        ({}, True),
        ({"label": torch.tensor([5, 5])}, True),
        ({"label": torch.tensor([5.0, 5.0])}, False),
        ({"label": torch.ones(3, 2, dtype=torch.int64)}, False),
        ({"label": None}, False),
        ({"label": 3}, False),
        ({"scale": torch.ones(3)}, False),
        ({"scale": 3.0}, False),
        ({"scale": 2}, False),
        ({"nested": {"text": torch.zeros(1, 2, dtype=torch.int64)}}, False),
        ({"nested": 3}, False),
        ({"name": "plain"}, True),
        ({"more": 1}, False),
    ],
    ids=str,
)
def test_can_concatenate(change: dict[str, Any], alike: bool) -> None:
    assert can_concatenate([_condition(), _condition() | change]) is alike
    assert can_concatenate([_condition() | change, _condition()]) is alike


def test_arrays_are_alike_only_if_they_are_the_same() -> None:
    array = np.ones(3)
    assert can_concatenate([{"grid": array}, {"grid": array}])
    assert not can_concatenate([{"grid": array}, {"grid": np.ones(3)}])


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        ({"label": torch.zeros(2)}, ValueError, r"c\['label'\] must have leading dimension 3 .* or 1 .*shape \(2,\)"),
        ({"label": torch.tensor(1)}, ValueError, r"c\['label'\] must have leading dimension 3 .*got shape \(\)"),
        ({"a": {"b": torch.zeros(4, 1)}}, ValueError, r"c\['a'\]\['b'\] must have leading dimension 3"),
        (
            {"label": torch.zeros(3, device="meta")},
            ValueError,
            r"c\['label'\] must be on the device of x \(cpu\), got meta",
        ),
        ({"label": [torch.zeros(3)]}, TypeError, r"c\['label'\] must hold its tensors in a mapping.*list of tensors"),
        ({"a": {"b": (1, torch.zeros(3))}}, TypeError, r"c\['a'\]\['b'\] must hold .* got a tuple of tensors"),
        (
            {"text": ["a", "b", "c"]},
            TypeError,
            r"c\['text'\] has something for each of 3 samples .* encode .* got list",
        ),
        ({"label": np.zeros(3)}, TypeError, r"c\['label'\] has something for each of 3 samples .* got ndarray"),
    ],
    ids=["rows", "0-d", "nested", "device", "list", "nested-tuple", "texts", "array"],
)
def test_check_rows(condition: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_rows("c", condition, 3, CPU)


def test_check_rows_accepts_rows_and_shared_rows() -> None:
    check_rows("c", _condition() | {"sizes": (8, 8), "names": ["a", "b"]}, 3, CPU)
    check_rows("c", {"prompt": ["for all"], "table": np.zeros((1, 4))}, 1, CPU)
