"""The part of the report about forecasts."""

import base64
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mfd_fast.data.occupancy.labels import CLASSES, FREE
from mfd_fast.report import write_report
from mfd_fast.report.occupancy import COLOURS, occupancy_section, occupancy_verdict
from mfd_fast.report.record import RunRecord, read_run


def row(role: str, steps: int | None, iou: float) -> dict[str, Any]:
    classes = dict.fromkeys(CLASSES, 50.0)
    shares = {"iou": [iou + 1, iou - 1], "miou": [80.0, 70.0], "mean_iou": iou, "mean_miou": 75.0, "classes": classes}
    return {"role": role, "steps": steps, "frames_per_second": 12.5 if steps else None, **shares}


def metrics(student: float = 36.0) -> dict[str, Any]:
    rows = [row("teacher", 1, 20.0), row("teacher", 10, 38.0), row("student", 1, student), row("recorded", None, 97.0)]
    return {"occupancy": {"scored": "occupancy", "windows": 9, "batch_size": 4, "rows": rows}, "seed": 0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "forecast"
    (folder / "evaluation" / "occupancy").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics()))
    view = np.full((2, 2, 6, 5), FREE, dtype=np.uint8)
    view[0, 1, 5, 0] = 4
    np.savez(
        folder / "evaluation" / "occupancy" / "views.npz", **{n: view for n in ("truth", "teacher-10", "student-1")}
    )
    return folder


def measured(run: Path, values: dict[str, Any]) -> RunRecord:
    return dataclasses.replace(read_run(run), metrics=values)


def test_table(run: Path) -> None:
    section = occupancy_section(read_run(run))
    assert section is not None
    assert section.columns[:4] == ["IoU, mean", "mIoU, mean", "Frames per second", "IoU, +1"]
    assert section.columns[-1] == "mIoU, +2"
    assert [line.name for line in section.rows] == [
        "Teacher, 1 step",
        "Teacher, 10 steps",
        "Student, 1 step",
        "Recorded latents",
    ]
    assert section.rows[2].cells == ["36.0", "75.0", "12.5", "37.0", "80.0", "35.0", "70.0"]
    assert [line.is_student for line in section.rows] == [False, False, True, False]
    assert section.rows[3].cells[2] == ""
    assert "9 held-out windows" in section.note


def test_pictures_look_ahead_upwards_in_the_colours_of_the_classes(run: Path) -> None:
    section = occupancy_section(read_run(run))
    assert section is not None
    assert [picture.title for picture in section.pictures] == ["Ground truth", "Teacher, 10 steps", "Student, 1 step"]
    content = base64.b64decode(section.pictures[0].light.partition(",")[2])
    pixels = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    car = tuple(int(COLOURS[4][i : i + 2], 16) for i in (1, 3, 5))
    where = np.argwhere((pixels == car).all(-1))
    # The farthest cell ahead, at the left, of the second frame of the first window.
    assert where[:, 0].max() < pixels.shape[0] / 2 / 5
    assert pixels.shape[1] / 2 < where[:, 1].min() < pixels.shape[1] * 0.52
    assert section.legend == [("car", COLOURS[4])]


@pytest.mark.parametrize(("student", "state"), [(36.0, "good"), (30.0, "look"), (20.0, "problem")])
def test_verdict(student: float, state: str, run: Path) -> None:
    verdict = occupancy_verdict(measured(run, metrics(student)))
    assert verdict is not None
    assert verdict.state == state
    assert verdict.sentence == (
        f"The 1-step student reaches an IoU of {student:.1f}; its teacher has 38.0 at 10 steps (and 20.0 at one step)."
    )


def test_a_teacher_that_forecasts_nothing_makes_no_good_student(run: Path) -> None:
    poor = metrics(36.0)
    poor["occupancy"]["rows"].append(row("repeated", None, 42.3))
    verdict = occupancy_verdict(measured(run, poor))
    assert verdict is not None
    assert verdict.state == "look"
    assert "The last frame again has 42.3" in verdict.detail


def test_latents_alone(run: Path) -> None:
    rows = [
        {"role": "student", "steps": 1, "frames_per_second": 3.0, "latent_rms": [0.5, 0.6], "mean_latent_rms": 0.55}
    ]
    record = measured(run, {"occupancy": {"scored": "latents", "windows": 2, "batch_size": 1, "rows": rows}})
    section, verdict = occupancy_section(record), occupancy_verdict(record)
    assert section is not None
    assert section.columns == ["RMS distance, mean", "Frames per second", "RMS distance, +1", "RMS distance, +2"]
    assert section.rows[0].cells == ["0.550", "3.00", "0.500", "0.600"]
    assert "Lower is better" in section.note
    assert verdict is not None
    assert verdict.state == "unknown"


def test_other_runs_have_no_such_part(full_run: Path) -> None:
    record = read_run(full_run)
    assert occupancy_section(record) is None
    assert occupancy_verdict(record) is None
    for broken in ({"occupancy": 3}, {"occupancy": {"rows": "x"}}, {"occupancy": {"rows": [3]}}):
        assert occupancy_section(dataclasses.replace(record, metrics=broken)) is None


def test_page_and_broken_views(run: Path) -> None:
    page = write_report(run).read_text()
    assert "<h2>Forecasts</h2>" in page
    assert "<h2>Samples</h2>" not in page
    assert "Recorded latents" in page
    (run / "evaluation" / "occupancy" / "views.npz").write_bytes(b"broken")
    again = write_report(run).read_text()
    assert "evaluation/occupancy/views.npz could not be read" in again
    assert "Recorded latents" in again
