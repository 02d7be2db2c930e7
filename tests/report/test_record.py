import math
from pathlib import Path

import numpy as np
import pytest

from mfd_fast.report.record import column, finite, number, numbers, read_run, without_replays


def test_a_complete_run_is_read(full_run: Path) -> None:
    record = read_run(full_run)
    assert record.name == "demo"
    assert record.place == f"{full_run.parent.name}/demo"
    assert record.metrics["student"] == {"1": 1.93}
    assert len(record.student_log) == 40
    assert len(record.auxiliary_log) == 80
    assert len(record.teacher_log) == 59
    assert sorted(record.samples) == ["student-1", "teacher-1", "teacher-10", "teacher-100"]
    assert record.samples["student-1"].x.shape == (60, 1, 8, 8)
    assert len(record.training_pictures) == 10
    assert not record.problems


def test_an_empty_folder_is_read(empty_run: Path) -> None:
    record = read_run(empty_run)
    assert not record.metrics
    assert not record.samples
    assert not record.problems
    assert record.settings_text is None


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match=r"run_folder must be an existing folder, got .*nowhere"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("log.jsonl", '{"update": 1, "role": "student"}\n{"upda', "log.jsonl: 1 line that could not be read was"),
        ("log.jsonl", '{"update": 1, "role": "student"}\n[1]\nx\n', "log.jsonl: 2 lines that could not be read were"),
        ("metrics.json", '{"teacher":\n {', "metrics.json is not valid JSON (line 2)"),
        ("versions.json", "[1, 2]", "versions.json does not hold a JSON object"),
        ("evaluation/student-1.npz", "not a zip", "evaluation/student-1.npz could not be read (ValueError)"),
    ],
    ids=["truncated-line", "broken-lines", "broken-metrics", "list-for-object", "broken-npz"],
)
def test_what_is_broken_is_noted_and_left_out(empty_run: Path, name: str, content: str, problem: str) -> None:
    path = empty_run / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    record = read_run(empty_run)
    assert len(record.problems) == 1
    assert record.problems[0].startswith(problem)
    assert len(record.student_log) == (1 if name == "log.jsonl" else 0)


def test_pickled_arrays_are_not_opened(empty_run: Path) -> None:
    (empty_run / "evaluation").mkdir()
    np.savez(empty_run / "evaluation" / "student-1.npz", x=np.array([{"a": 1}], dtype=object))
    record = read_run(empty_run)
    assert not record.samples
    assert "student-1.npz could not be read (ValueError)" in record.problems[0]


def test_labels_of_a_wrong_length_are_ignored(empty_run: Path) -> None:
    (empty_run / "evaluation").mkdir()
    np.savez(empty_run / "evaluation" / "student-1.npz", x=np.zeros((4, 2)), condition=np.zeros(3, dtype=int))
    assert read_run(empty_run).samples["student-1"].condition is None


def test_lines_that_a_resume_repeats_count_once() -> None:
    lines = [{"update": update, "loss": loss} for update, loss in [(1, 1.0), (2, 2.0), (3, 3.0), (3, 3.5), (2, 20.0)]]
    assert without_replays(lines) == [{"update": 1, "loss": 1.0}, {"update": 2, "loss": 2.0}, lines[-1]]


def test_a_column_has_nan_for_null_and_skips_lines_without_it() -> None:
    lines = [{"update": 1, "loss": 0.5}, {"update": 2}, {"update": 3, "loss": None}, {"loss": 1.0}]
    updates, values = column(lines, "loss")
    np.testing.assert_array_equal(updates, [1, 3])
    np.testing.assert_array_equal(values, [0.5, math.nan])


def test_only_numbers_count_as_numbers() -> None:
    assert number(True) is None
    assert number("1") is None
    assert finite(math.inf) is None
    assert numbers({"a": 1, "b": math.nan, "c": "x"}) == {"a": 1.0}
    assert numbers(3) == {}


@pytest.mark.parametrize(
    ("content", "expected"),
    [("{}", (-1, 1)), ('{"value_range": [0, 2]}', (0, 2)), ('{"value_range": [2, 0]}', (-1, 1))],
    ids=["default", "given", "empty-range"],
)
def test_value_range(empty_run: Path, content: str, expected: tuple[float, float]) -> None:
    (empty_run / "student.json").write_text(content)
    assert read_run(empty_run).value_range == expected
