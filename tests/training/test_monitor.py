import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mfd_fast.training.monitor import Monitor, cut_log


def make(folder: Path, **changes: Any) -> Monitor:
    options: dict[str, Any] = {"title": "work", "total": 4, "start": 0, "seconds": 0.0, "tensorboard": None}
    return Monitor(folder / "log.jsonl", **(options | {"enabled": True} | changes))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_line_is_json_with_what_was_logged(tmp_path: Path) -> None:
    with make(tmp_path / "new") as monitor:
        monitor.log(1, {"role": "student", "loss": 0.5, "bins": [1.0, float("nan"), None], "skipped": 0})
        monitor.log(2, {"role": "auxiliary", "loss": float("inf"), "grad_norm": float("nan")})
    first, second = lines(tmp_path / "new")
    assert first.pop("seconds") >= 0
    assert first == {"update": 1, "role": "student", "loss": 0.5, "bins": [1.0, None, None], "skipped": 0}
    assert (second["loss"], second["grad_norm"]) == (None, None)


def test_lines_can_be_read_while_the_training_runs(tmp_path: Path) -> None:
    with make(tmp_path) as monitor:
        monitor.log(1, {"loss": 1.0})
        assert lines(tmp_path)[0]["loss"] == 1.0


def test_a_resumed_log_loses_what_came_after(tmp_path: Path) -> None:
    with make(tmp_path) as monitor:
        for update in (1, 2, 3):
            monitor.log(update, {"loss": float(update)})
    with make(tmp_path, start=2, seconds=100.0) as monitor:
        monitor.log(3, {"loss": 30.0})
    assert [(line["update"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert 100 <= lines(tmp_path)[-1]["seconds"] < 200


def test_a_new_start_empties_the_log(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"update": 1}\n')
    make(tmp_path).close()
    assert lines(tmp_path) == []


@pytest.mark.parametrize("left", ['{"update": 3, "lo', "null", "7", '{"other": 1}', '{"update": "x"}'])
def test_a_line_that_a_killed_run_left_is_dropped(left: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"update": 1}\n{"update": 2}\n' + left)
    cut_log(log, 2)
    assert log.read_text() == '{"update": 1}\n{"update": 2}\n'


def test_cutting_a_log_that_is_not_there_makes_its_folder(tmp_path: Path) -> None:
    cut_log(tmp_path / "run" / "log.jsonl", 5)
    assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_without_a_terminal_a_few_plain_lines_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with make(tmp_path, total=99) as monitor:
        for update in range(1, 100):
            monitor.advance(update, {"loss": 0.25} if update == 50 else {})
    captured = capsys.readouterr()
    printed = captured.out.splitlines()
    assert captured.err == ""
    assert len(printed) == 20
    assert printed[0].startswith("work: 5/99 updates, about ")
    assert printed[0].endswith(" left")
    assert printed[-1].startswith("work: 99/99 updates, loss 0.25, about 00:00 left")


def test_what_is_left_of_a_long_run_is_said_in_hours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with make(tmp_path, total=100, seconds=3600.0) as monitor:
        monitor.advance(5, {})
    assert ", about 19:00:0" in capsys.readouterr().out


def test_on_a_terminal_there_is_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with make(tmp_path, start=1) as monitor:
        monitor.advance(2, {"loss": 0.25})
        monitor.advance(4, {})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "work" in captured.err
    assert "4/4" in captured.err
    assert "loss=0.25" in captured.err


def test_other_processes_are_silent_on_a_terminal_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with make(tmp_path, enabled=False, tensorboard=tmp_path / "events") as monitor:
        monitor.log(1, {"loss": 1.0})
        monitor.advance(4, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_a_resumed_training_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = tmp_path / "events"
    with make(tmp_path, tensorboard=events) as monitor:
        for update in (1, 2, 3):
            monitor.log(update, {"role": "student", "loss": float(update), "bins": [1.0], "note": "text"})
    with make(tmp_path, tensorboard=events, start=2) as monitor:
        monitor.log(3, {"role": "student", "loss": 30.0})
    shown = EventAccumulator(str(events)).Reload()
    assert shown.Tags()["scalars"] == ["student/loss"]
    assert [(event.step, event.value) for event in shown.Scalars("student/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorboard_is_left_out_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with make(tmp_path, tensorboard=tmp_path / "events") as monitor:
        monitor.log(1, {"loss": 1.0})
    assert not (tmp_path / "events").exists()


def test_a_cut_that_fails_leaves_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mfd_fast.training.monitor import cut_log

    log = tmp_path / "log.jsonl"
    log.write_text('{"update": 1}\n{"update": 2}\n')
    before = log.read_text()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mfd_fast.storage.sync", full)
    with pytest.raises(OSError, match="No space left"):
        cut_log(log, 1)
    assert log.read_text() == before
    assert list(tmp_path.iterdir()) == [log]
