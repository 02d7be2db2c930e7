"""A teacher and data of the user's own, on the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

OWN = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6 * 5 + 1 + 2, 30)

    def forward(self, x, t, speed):
        return self.layer(torch.cat([x.flatten(1), t[:, None], speed], 1)).view_as(x)


def make():
    torch.manual_seed(0)
    return Net()
"""
FEW = [
    part
    for setting in (
        *("data.name=npz", "data.root=mine.npz", "distill.student_updates=2", "distill.batch_size=8"),
        *("teacher.updates=2", "teacher.batch_size=8", "run.tensorboard=false", "evaluate.num_samples=20"),
    )
    for part in ("--set", setting)
]


def test_a_teacher_with_a_condition(cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_net.py").write_text(OWN)
    draw = np.random.default_rng(0)
    np.savez("mine.npz", x=draw.normal(size=(60, 6, 5)), speed=draw.normal(size=(60, 2)))
    result = cli("distill", "--teacher", "own_net:make", "--run", "run", *FEW)
    assert result.code == 0, result.err
    assert cli("evaluate", "run", "--trust-code").code == 0
    assert json.loads(Path("run/metrics.json").read_text())["student"].keys() == {"1"}
    assert cli("sample", "run", "--trust-code", "--num", "3", "--out", "samples.npz").code == 0
    with np.load("samples.npz") as arrays:
        assert arrays["x"].shape == (3, 6, 5)


def test_pictures_and_labels_from_the_first_command_to_the_report(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (60, 3, 8, 8), np.uint8)
    np.savez("mine.npz", x=pixels, label=np.arange(60) % 4)
    result = cli("demo", "--run", "run", *FEW, "--set", "data.options.pictures=true", "--set", "model.options.width=16")
    assert result.code == 0, result.err
    assert cli("sample", "run", "--label", "3", "--num", "4", "--grid", "grid.png", "--out", "threes.npz").code == 0
    with np.load("threes.npz") as arrays:
        assert arrays["x"].shape == (4, 3, 8, 8)
        assert np.abs(arrays["x"]).max() <= 1
        assert arrays["condition"].tolist() == [3] * 4
    assert "data:image/" in Path("run/report.html").read_text("utf-8")
