"""What a run folder holds, read with patience: what is missing stays empty, what is broken is noted in words."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mfd_fast.npz import as_float32, read_arrays

LogLines = list[dict[str, Any]]


class Samples(NamedTuple):
    """One file of ``evaluation/``."""

    x: NDArray[np.float32]
    """``[N, *sample_shape]``."""
    condition: NDArray[np.int64] | None
    """``[N]`` labels, or None."""


@dataclass(frozen=True)
class RunRecord:
    """Everything a report is made of."""

    name: str
    place: str
    """The last two parts of the folder's path, as a user would type them."""
    metrics: Mapping[str, Any]
    versions: Mapping[str, Any]
    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    settings_text: str | None
    teacher_log: LogLines
    auxiliary_log: LogLines
    student_log: LogLines
    samples: Mapping[str, Samples]
    """By file stem: ``teacher-100``, ``student-1``, and ``data`` where the run kept real samples."""
    training_pictures: Sequence[Path]
    problems: Sequence[str]
    """Sentences about what could not be read."""
    views: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    """Forecasts of occupancy from above by name, labels ``[windows, frames, X, Y]``."""

    def log(self, role: str) -> LogLines:
        """The log of ``teacher``, ``auxiliary`` or ``student``."""
        return {"teacher": self.teacher_log, "auxiliary": self.auxiliary_log, "student": self.student_log}[role]

    @property
    def student_network(self) -> Mapping[str, Any]:
        """How the student's network is built: the entry ``network`` of ``student.json``, or all of it."""
        network = self.student.get("network", self.student)
        return network if isinstance(network, Mapping) else {}

    @property
    def is_pictured(self) -> bool:
        """Whether the student is of a diffusers pipeline: it has no samples to be measured with, only pictures."""
        return "pipeline" in self.student_network

    @property
    def value_range(self) -> tuple[float, float]:
        """The values shown as black and white: what ``student.json`` says, else (-1, 1)."""
        match self.student.get("value_range"):
            case [int() | float() as low, int() | float() as high] if low < high:
                return float(low), float(high)
            case _:
                return -1.0, 1.0


def read_run(folder: Path) -> RunRecord:
    """Read a run folder; raises NotADirectoryError when ``folder`` is not a folder."""
    if not folder.is_dir():
        raise NotADirectoryError(f"run_folder must be an existing folder, got {str(folder)!r}")
    reader = _Reader(folder)
    resolved = folder.resolve()
    log = reader.lines("log.jsonl")
    return RunRecord(
        name=resolved.name,
        place="/".join(part for part in (resolved.parent.name, resolved.name) if part),
        metrics=reader.mapping("metrics.json"),
        versions=reader.mapping("versions.json"),
        teacher=reader.mapping("teacher.json"),
        student=reader.mapping("student.json"),
        settings_text=reader.text("settings.toml"),
        teacher_log=without_replays(reader.lines("teacher_log.jsonl")),
        auxiliary_log=without_replays([line for line in log if line.get("role") == "auxiliary"]),
        student_log=without_replays([line for line in log if line.get("role") == "student"]),
        samples=reader.samples(),
        training_pictures=sorted((folder / "samples").glob("update-*.png")),
        problems=reader.problems,
        views=reader.views(),
    )


def number(value: object) -> float | None:
    """``value`` as a float (possibly NaN or infinite), or None when it is not a number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def finite(value: object) -> float | None:
    """``value`` as a float, or None when it is not a finite number."""
    result = number(value)
    return result if result is not None and math.isfinite(result) else None


def numbers(values: object) -> dict[str, float]:
    """The entries of a mapping that are finite numbers; nothing of anything else."""
    if not isinstance(values, Mapping):
        return {}
    return {str(key): result for key, value in values.items() if (result := finite(value)) is not None}


def column(lines: LogLines, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Updates and the values of ``key``, one per line that has both; a value that is null is NaN."""
    pairs = [
        (update, number(line[key]))
        for line in lines
        if key in line and (update := finite(line.get("update"))) is not None
    ]
    updates = np.array([update for update, _ in pairs], dtype=np.float64)
    return updates, np.array([math.nan if value is None else value for _, value in pairs], dtype=np.float64)


def steps_in(stem: str) -> int:
    """The number of steps in the name of a file of samples, ``teacher-100``; 0 without one."""
    steps = stem.rpartition("-")[2]
    return int(steps) if steps.isdecimal() else 0


def last_update(*logs: LogLines) -> int:
    """The highest update in the logs, 0 without any."""
    return int(max((finite(line.get("update")) or 0.0 for lines in logs for line in lines), default=0.0))


def without_replays(lines: LogLines) -> LogLines:
    """The lines without those that a resumed run wrote a second time: where the update falls back, the later count."""
    kept: LogLines = []
    for line in lines:
        update = finite(line.get("update"))
        while update is not None and kept and (finite(kept[-1].get("update")) or 0.0) > update:
            kept.pop()
        kept.append(line)
    return kept


@dataclass
class _Reader:
    folder: Path
    problems: list[str] = field(default_factory=list)

    def text(self, name: str) -> str | None:
        path = self.folder / name
        if not path.is_file():
            return None
        return path.read_text(encoding="utf-8", errors="replace")

    def mapping(self, name: str) -> Mapping[str, Any]:
        text = self.text(name)
        if text is None:
            return {}
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            line = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
            self.problems.append(f"{name} is not valid JSON{line} and was left out.")
            return {}
        if isinstance(value, dict):
            return value
        self.problems.append(f"{name} does not hold a JSON object and was left out.")
        return {}

    def lines(self, name: str) -> LogLines:
        good: LogLines = []
        broken = 0
        for text in (self.text(name) or "").splitlines():
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                broken += 1
                continue
            if isinstance(value, dict):
                good.append(value)
            else:
                broken += 1
        if broken:
            what = "1 line that could not be read was" if broken == 1 else f"{broken} lines that could not be read were"
            self.problems.append(f"{name}: {what} left out (a run that is killed can leave a line half written).")
        return good

    def views(self) -> dict[str, NDArray[np.uint8]]:
        path = self.folder / "evaluation" / "occupancy" / "views.npz"
        if not path.is_file():
            return {}
        try:
            found = read_arrays(path)
        except (OSError, ValueError) as error:
            found, reason = {}, type(error).__name__
            self.problems.append(f"evaluation/occupancy/{path.name} could not be read ({reason}) and was left out.")
        return {name: view for name, view in found.items() if view.ndim == 4 and view.dtype == np.uint8}

    def samples(self) -> dict[str, Samples]:
        found: dict[str, Samples] = {}
        for path in sorted((self.folder / "evaluation").glob("*.npz")):
            try:
                arrays = read_arrays(path)
                x, condition = as_float32(arrays["x"]), arrays.get("condition")
            except (OSError, ValueError, KeyError) as error:
                reason = type(error).__name__
                self.problems.append(f"evaluation/{path.name} could not be read ({reason}) and was left out.")
                continue
            if condition is not None and (condition.shape != x.shape[:1] or condition.dtype.kind not in "iu"):
                condition = None
            if x.ndim >= 2 and len(x):
                found[path.stem] = Samples(x, None if condition is None else condition.astype(np.int64))
        return found
