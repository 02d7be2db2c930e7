import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mfd_fast.config import Settings
from mfd_fast.data import load_dataset
from mfd_fast.data.dataset import Dataset
from mfd_fast.distillation import distill
from mfd_fast.evaluation import evaluate_run, make_samplers, summarise, write_samples
from mfd_fast.finished import load_student
from mfd_fast.metrics import sliced_wasserstein
from mfd_fast.models import build_model, describe_model
from mfd_fast.phases import Phases
from mfd_fast.run_folder import RunFolder
from mfd_fast.settings_io import load_settings
from mfd_fast.storage import write_json
from mfd_fast.student import Student
from mfd_fast.task import Task


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset("gaussian-2d", num_samples=300, num_held_out=100)


def settings(*overrides: str) -> Settings:
    tiny = ("distill.student_updates=1", "distill.cycle_auxiliary=1", "distill.batch_size=8", "run.device=cpu")
    return load_settings(
        "mixture-2d", overrides=[*tiny, "run.tensorboard=false", "evaluate.teacher_steps=[1,3]", *overrides]
    )


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished distillation of an untrained teacher, into a student of two steps."""
    folder = RunFolder(tmp_path_factory.mktemp("evaluation") / "run")
    teacher = build_model("mlp", (2,), None, width=8, depth=1)
    torch.nn.init.normal_(teacher.leave.weight, std=0.2)  # type: ignore[arg-type]
    folder.write_network("teacher", dict(teacher.state_dict()), describe_model(teacher))
    distill(teacher, settings("distill.student_steps=2"), dataset, folder.path)
    return folder


def test_the_teacher_computes_in_the_precision_of_the_student(run: RunFolder, dataset: Dataset) -> None:
    """Frames per second and quality are compared: one in float16 and one in float32 would be two machines."""
    noise, teacher = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), run.read_teacher()
    ends = {}
    for precision in ("float32", "bfloat16"):
        chosen = settings(f"distill.precision={precision}")
        ends[precision] = make_samplers(run, chosen, dataset, torch.device("cpu"))["teacher-1"].generate(noise, {})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = noise - teacher(noise, torch.ones(64)).float()
    torch.testing.assert_close(ends["bfloat16"], low, rtol=0, atol=0)
    assert not torch.equal(low, ends["float32"])


def test_metrics_hold_what_was_promised(run: RunFolder, dataset: Dataset) -> None:
    phases = Phases()
    metrics = evaluate_run(run, settings("run.seed=5"), dataset, phases=phases)
    assert json.loads((run.path / "metrics.json").read_text()) == metrics
    assert metrics["teacher"].keys() == {"1", "3"}
    assert metrics["student"].keys() == {"2"}
    assert metrics["held_out"].keys() == {"teacher", "student", "data"}
    for name in ("precision", "recall", "class_agreement"):
        assert metrics[name].keys() == {"teacher", "student"}
    assert metrics["class_agreement"] == {"teacher": None, "student": None}
    assert metrics["nearest_neighbour"].keys() == {"teacher", "student", "held_out"}
    assert metrics["data_half_half"] > 0
    assert metrics["seed"] == 5
    assert metrics["seconds"].keys() == metrics["cpu_seconds"].keys() == {"sample", "evaluate"}
    assert phases.seconds == metrics["seconds"]


def test_numbers_are_those_of_the_samples_that_are_kept(run: RunFolder, dataset: Dataset) -> None:
    metrics = evaluate_run(run, settings(), dataset)
    real = torch.cat([dataset.x, dataset.held_out_x])
    files = {path.stem: path for path in (run.path / "evaluation").iterdir()}
    assert files.keys() == {"teacher-1", "teacher-3", "student-2", "data"}
    with np.load(files.pop("data")) as arrays:
        assert np.array_equal(arrays["x"], dataset.x.numpy())
    for name, path in files.items():
        with np.load(path, allow_pickle=False) as arrays:
            assert set(arrays) == {"x"}
            x = torch.from_numpy(arrays["x"])
        assert x.dtype == torch.float32
        assert x.shape == real.shape, "as many as there are real samples"
        role, steps = name.split("-")
        assert metrics[role][steps] == pytest.approx(sliced_wasserstein(real, x), rel=1e-6)
    with np.load(files["student-2"]) as student, np.load(files["teacher-3"]) as teacher:
        assert np.array_equal(student["x"], load_student(run.path).sample(400, seed=0).numpy())
        assert np.array_equal(teacher["x"], Student(run.read_teacher(), (2,), 3).sample(400, seed=0).numpy())


def test_number_of_samples_and_batches_can_be_chosen(run: RunFolder, dataset: Dataset) -> None:
    evaluate_run(run, settings("evaluate.num_samples=50", "evaluate.batch_size=7"), dataset)
    with np.load(run.path / "evaluation" / "student-2.npz") as arrays:
        np.testing.assert_allclose(arrays["x"], load_student(run.path).sample(50, seed=0).numpy(), atol=1e-6)


def test_seconds_of_earlier_phases_are_kept(run: RunFolder, dataset: Dataset) -> None:
    write_json(run.path / "metrics.json", {"seconds": {"teacher": 5.0, "evaluate": 99.0}, "cpu_seconds": {}})
    metrics = evaluate_run(run, settings("evaluate.num_samples=50"), dataset)
    assert metrics["seconds"]["teacher"] == 5.0
    assert metrics["seconds"]["evaluate"] < 99.0
    assert "teacher" not in metrics["cpu_seconds"]


def test_labels_are_shared_by_teacher_and_student(tmp_path: Path) -> None:
    label = torch.tensor([0, 1, 2] * 100)
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    data = Dataset("labelled", x, label, x[:50], label[:50], 3)
    teacher = build_model("mlp", (2,), 3, width=8, depth=1)
    run = RunFolder(tmp_path)
    distill(teacher, settings(), data, run.path)
    assert Task.from_dataset(data, teacher).label_counts == (100, 100, 100)
    evaluate_run(run, settings("evaluate.num_samples=90"), data)
    with (
        np.load(run.path / "evaluation" / "student-1.npz") as a,
        np.load(run.path / "evaluation" / "teacher-1.npz") as b,
    ):
        assert a["condition"].dtype == np.int64
        assert a["condition"].shape == (90,)
        assert np.array_equal(a["condition"], b["condition"])
        assert set(a["condition"]) == {0, 1, 2}


def report(**values: dict[str, Any]) -> dict[str, Any]:
    return {
        "feature_space": "points",
        "data_half_half": 0.5,
        "distance": "furlongs",
        "held_out_distance": 0.6,
        "held_out_nearest_neighbour": 0.7,
        "samples": values,
    }


def measured(base: float) -> dict[str, Any]:
    names = ("distance", "distance_training", "distance_held_out", "precision", "recall", "nearest_neighbour")
    return {name: base + index for index, name in enumerate(names)} | {"class_agreement": None}


def test_the_summary_speaks_of_the_teachers_most_steps() -> None:
    values = {
        "teacher-9": measured(10),
        "teacher-100": measured(20),
        "teacher-1": measured(30),
        "student-4": measured(40),
    }
    summary = summarise(report(**values), settings())
    assert summary["teacher"] == {"9": 10, "100": 20, "1": 30}
    assert summary["student"] == {"4": 40}
    assert summary["held_out"] == {"teacher": 22, "student": 42, "data": 0.6}
    assert (summary["distance"], summary["feature_space"]) == ("furlongs", "points")
    assert summary["precision"] == {"teacher": 23, "student": 43}
    assert summary["recall"] == {"teacher": 24, "student": 44}
    assert summary["nearest_neighbour"] == {"teacher": 25, "student": 45, "held_out": 0.7}


def test_the_summary_of_a_student_alone() -> None:
    summary = summarise(report(**{"student-1": measured(1)}), settings())
    assert summary["teacher"] == {}
    assert summary["precision"] == {"student": 4}


def test_samples_are_written_in_the_stated_types(tmp_path: Path) -> None:
    write_samples(tmp_path / "a" / "b.npz", torch.zeros(3, 2, dtype=torch.float64), torch.tensor([1, 2, 3]).int())
    with np.load(tmp_path / "a" / "b.npz", allow_pickle=False) as arrays:
        assert arrays["x"].dtype == np.float32
        assert arrays["condition"].dtype == np.int64
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.npz"]


def test_phases_add_up_wall_and_cpu_time_and_survive_errors() -> None:
    phases = Phases()

    def fail() -> None:
        sum(range(200_000))
        raise KeyError

    with pytest.raises(KeyError), phases.phase("work"):
        fail()
    assert 0 < phases.seconds["work"] < 60
    assert phases.cpu_seconds["work"] > 0


def test_samples_are_drawn_on_the_device_of_the_run(
    run: RunFolder, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.device | str] = []
    sample = Student.sample

    def watched(student: Student, *arguments: Any, **options: Any) -> torch.Tensor:
        drawn.append(student.device)
        return sample(student, *arguments, **options)

    monkeypatch.setattr(Student, "sample", watched)
    monkeypatch.setattr("mfd_fast.evaluation.choose_device", lambda name, argument: torch.device("cpu", 0))
    evaluate_run(run, settings(), dataset)
    assert [str(device) for device in drawn] == ["cpu:0"] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_device_that_is_not_there(run: RunFolder, dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"run.device is 'cuda', but torch sees no CUDA device"):
        evaluate_run(run, settings("run.device=cuda"), dataset)
