"""The tables of the pages say what the committed results say."""

import json
from pathlib import Path
from typing import Any

from mfd_fast.experiments.base import spread_words
from mfd_fast.experiments.table import REFERENCE, TABLE, TIMED

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks/results/experiments/table.json").read_text(encoding="utf-8"))
CELLS: dict[str, list[dict[str, Any]]] = RESULT["cells"]


def ratio(cell: str) -> str:
    """The distance over the teacher's, of the seeds that have the cell."""
    teacher = [run["steps"][REFERENCE]["distance"] for run in CELLS["teacher"]]
    return spread_words([a["distance"] / b for a, b in zip(CELLS[cell], teacher, strict=True) if "distance" in a])


def row(method: str) -> str:
    """A method's line in the table of docs/methods.md."""
    runs = CELLS[method]
    precision, recall, seconds = (
        spread_words([run[name] for run in runs]) for name in ("precision", "recall", "cpu_seconds")
    )
    timed = [run for run in CELLS.get(method + TIMED, ()) if "distance" in run]
    longer = f"{ratio(method + TIMED)} with {timed[0]['student_updates']}" if timed else ""
    return f"| `{method}` | {ratio(method)} | {precision} / {recall} | {seconds} | {longer} |"


def test_the_table_of_methods_is_that_of_the_result() -> None:
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    for method in TABLE.full.methods:
        assert row(method) in page


def test_the_finding_on_the_page_is_that_of_the_result() -> None:
    assert RESULT["finding"] == TABLE.finding(CELLS)
    assert RESULT["finding"] in (ROOT / "docs/experiments.md").read_text(encoding="utf-8")


def test_every_method_is_as_near_to_the_teacher_as_the_page_says() -> None:
    limits = {"mfd": 1.2, "vsd": 1.5, "dmd2": 1.5, "senseflow": 1.5}
    for method in TABLE.full.methods:
        assert float(ratio(method).split()[0]) <= limits.get(method, 5.0), method
