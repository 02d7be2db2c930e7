"""Checkpoints of OccFM: names, sections, and files that are something else."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transition import SMALL, inputs, small
from torch import Tensor

from mfd_fast.models.occfm import TransitionModel, load_transition_weights


def checkpoint(tmp_path: Path, weights: dict[str, Tensor], **sections: Any) -> Path:
    path = tmp_path / "epoch=000199.ckpt"
    torch.save({"state_dict": weights, "epoch": 199, "lr_scheduler": {"base_lrs": [1e-4]}, **sections}, path)
    return path


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "transition_model.",
        "module.transition_model.",
        "model.transition_model.",
        "module._orig_mod.transition_model.",
        "",
    ],
)
def test_weights_under_the_names_of_frameworks(prefix: str, tmp_path: Path) -> None:
    trained, fresh = small(), TransitionModel(4, frames=6, input_size=(8, 8), trajectory_length=6, **SMALL)
    others = {} if prefix == "" else {"module.decoder.conv_in.weight": torch.zeros(2), "encoder.x": torch.zeros(1)}
    report = load_transition_weights(fresh, checkpoint(tmp_path, under(prefix, trained.state_dict()) | others))
    assert torch.equal(fresh(*inputs()), trained(*inputs()))
    assert report.section == "state_dict"
    assert report.left_over == ([] if prefix == "" else ["decoder.conv_in.weight", "encoder.x"])


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    trained = small()
    other = {name: value + 1 for name, value in trained.state_dict().items()}
    average = under("module.transition_model.", trained.state_dict()) | {"n_averaged": torch.tensor(7)}
    path = checkpoint(tmp_path, under("module.transition_model.", other), ema_model=average)
    fresh = small()
    report = load_transition_weights(fresh, path)
    assert (report.section, report.left_over) == ("ema_model", ["n_averaged"])
    assert torch.equal(fresh.init_conv.weight, trained.init_conv.weight)
    assert load_transition_weights(fresh, path, "state_dict").section == "state_dict"
    assert torch.equal(fresh.init_conv.weight, trained.init_conv.weight + 1)
    without = checkpoint(tmp_path, under("transition_model.", other), ema_model=None)
    assert load_transition_weights(fresh, without).section == "state_dict"
    with pytest.raises(ValueError, match="no section 'ema_model' with weights; it has state_dict"):
        load_transition_weights(fresh, without, "ema_model")


def _without(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name != "init_conv.bias"}


def _with_more(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"extra": torch.zeros(1)}


def _misshapen(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"traj_encoder.0.weight": torch.zeros(16, 3)}


def _not_finite(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"init_conv.bias": torch.full((8,), torch.nan)}


def _whole_numbers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"init_conv.bias": torch.ones(8, dtype=torch.int64)}


def _twice(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"module.transition_model.init_conv.bias": torch.ones(8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, "does not fit the model: missing init_conv.bias"),
        (_with_more, "unexpected extra"),
        (_misshapen, r"traj_encoder\.0\.weight has shape \[16, 3\], expected \[16, 192\]"),
        (_not_finite, "does not fit the model: init_conv.bias holds numbers that are not finite"),
        (_whole_numbers, r"does not fit the model: init_conv.bias is of type torch\.int64"),
        (_twice, "transition_model.init_conv.bias twice, also as module.transition_model.init_conv.bias: which one"),
        (lambda _: {"x": torch.zeros(1)}, r"holds no transition model: no name in it .* \(names: x\)"),
    ],
    ids=["missing", "unexpected", "shape", "not-finite", "whole-numbers", "twice", "none"],
)
def test_weights_that_do_not_fit_change_nothing(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = change(dict(model.state_dict()))
    prefix = "" if "x" in wrong else "transition_model."
    named = {name if name.startswith("module.") else f"{prefix}{name}": value for name, value in wrong.items()}
    with pytest.raises(ValueError, match=message):
        load_transition_weights(model, checkpoint(tmp_path, named))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_that_wants_to_run_something_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    path = checkpoint(tmp_path, under("transition_model.", small().state_dict()), config=_Malicious(mark))
    with pytest.raises(
        ValueError, match=r"does not hold plain weights and was not loaded: it asks for (posix|nt)\.system"
    ):
        load_transition_weights(small(), path)
    assert not mark.exists()


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint: there is no file .*nowhere\.ckpt"):
        load_transition_weights(small(), tmp_path / "nowhere.ckpt")
    path = checkpoint(tmp_path, under("transition_model.", small().state_dict()))
    content = path.read_bytes()
    for name, broken in (("cut", content[: len(content) // 2]), ("empty", b""), ("text", b"weights\n" * 40)):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ValueError, match=f"{name} is damaged or holds no weights"):
            load_transition_weights(small(), tmp_path / name)
    (tmp_path / "list").write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ValueError, match="list"):
        load_transition_weights(small(), tmp_path / "list")
