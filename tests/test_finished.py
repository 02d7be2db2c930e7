"""What is written about a finished student is checked before anything is built from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mfd_fast.finished import load_student
from mfd_fast.models import describe_model
from mfd_fast.models.mlp import MLP
from mfd_fast.run_folder import RunFolder

WHOLE: dict[str, Any] = {
    "roles": "full",
    "lora": None,
    "steps": 2,
    "shift": 3.0,
    "sampler": "euler",
    "gamma": 0.5,
    "second_time": False,
    "precision": "float32",
    "sample_shape": [2],
    "label_counts": None,
    "value_range": [-1, 1],
    "condition_names": [],
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with a student of random weights."""
    network = MLP((2,), width=8, depth=1)
    folder = RunFolder(tmp_path)
    folder.write_network("student", dict(network.state_dict()), WHOLE | {"network": describe_model(network)})
    return folder


def change(run: RunFolder, **changes: Any) -> None:
    path = run.path / "student.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_written_is_read(run: RunFolder) -> None:
    student = load_student(run.path)
    assert (student.steps, student.shift, student.sampler, student.gamma) == (2, 3.0, "euler", 0.5)
    assert (student.sample_shape, student.value_range, student.label_counts) == ((2,), (-1.0, 1.0), None)
    samples = student.sample(5, seed=1)
    assert samples.shape == (5, 2)
    assert torch.equal(samples, load_student(run.path).sample(5, seed=1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network", "mlp"),
        ("roles", "half"),
        ("lora", {"rank": 4}),
        ("steps", 1.5),
        ("shift", None),
        ("sampler", ["euler"]),
        ("gamma", "0"),
        ("second_time", 1),
        ("precision", {}),
        ("sample_shape", [2.0]),
        ("label_counts", 7),
        ("value_range", [0]),
        ("condition_names", "label"),
    ],
)
def test_a_wrong_entry_is_named(run: RunFolder, name: str, value: Any) -> None:
    change(run, **{name: value})
    with pytest.raises(ValueError, match=rf"student\.json is damaged: {name} is "):
        load_student(run.path)


def test_a_low_rank_student_says_its_ranks(run: RunFolder) -> None:
    change(run, roles="lora")
    with pytest.raises(ValueError, match=r"student\.json is damaged: lora is None"):
        load_student(run.path)


def test_lost_entries_are_named(run: RunFolder) -> None:
    path = run.path / "student.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in whole.items() if name not in ("gamma", "sampler")}))
    with pytest.raises(ValueError, match=r"student\.json is damaged: it lacks sampler, gamma"):
        load_student(run.path)
