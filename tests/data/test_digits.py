"""The digits: their scale, and a split that never changes."""

import builtins
import hashlib
from typing import Any

import pytest
import torch

from mfd_fast.data.digits import digits


def test_shapes_and_range() -> None:
    dataset = digits()
    assert dataset.sample_shape == (1, 8, 8)
    assert (len(dataset.x), len(dataset.held_out_x)) == (1438, 359)
    assert dataset.num_classes == 10
    assert dataset.value_range == (-1.0, 1.0)
    assert float(dataset.x.min()) == -1.0
    assert float(dataset.x.max()) == 1.0


def test_both_splits_hold_every_digit_once() -> None:
    from sklearn.datasets import load_digits

    dataset = digits()
    together = torch.cat([dataset.x, dataset.held_out_x]).flatten(1).add(1).mul(8)
    original = torch.from_numpy(load_digits().data).float()
    assert torch.equal(torch.unique(together, dim=0), torch.unique(original, dim=0))
    assert len(together) == len(original)


def test_split_is_stratified() -> None:
    dataset = digits()
    assert dataset.label is not None
    assert dataset.held_out_label is not None
    counts, held_out = dataset.label.bincount(), dataset.held_out_label.bincount()
    assert int((held_out - 0.2 * (counts + held_out)).abs().max()) == 0


def test_split_depends_on_no_seed() -> None:
    torch.manual_seed(1)
    first = digits()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(digits().held_out_x, first.held_out_x)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    content = hashlib.sha256(first.held_out_x.numpy().tobytes()).hexdigest()
    assert content[:16] == "617fdcecadc9398f"


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "mfd_fast\[data\]"'):
        digits()
