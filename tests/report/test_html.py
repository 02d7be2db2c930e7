import base64
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mfd_fast.report import save_image_grid, write_report

VOID = {"meta", "img", "source", "br", "link"}


class _Page(HTMLParser):
    """Addresses, alternative texts, words and open elements of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.addresses: list[str] = []
        self.alternatives: list[str | None] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.addresses += [values[name] or "" for name in ("src", "srcset", "href") if name in values]
        if tag == "img":
            self.alternatives.append(values.get("alt"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data


@pytest.fixture(scope="module")
def page(full_run: Path) -> _Page:
    path = write_report(full_run)
    assert path == full_run / "report.html"
    return _Page(path)


def test_the_page_is_well_formed_and_complete(page: _Page) -> None:
    assert page.source.lstrip().startswith("<!DOCTYPE html>")
    assert page.open == []
    headings = ["Samples", "Metrics", "Is this run healthy?", "Curves", "Time", "How to repeat it"]
    assert re.findall(r"<h2>(.*?)</h2>", page.source) == headings


def test_the_verdict_and_the_metrics_are_on_the_page(page: _Page) -> None:
    assert "reaches a Fréchet distance of 1.93; its teacher needs 100 steps for 2.10 (and has 375" in page.words
    for value in ("8.41", "0.850", "3.30", "0.991", "2.42", "7 min 40 s"):
        assert value in page.words


def test_every_figure_is_inside_the_page_and_described(page: _Page) -> None:
    # Three sample grids and six moments; eight charts, each for light and for dark pages.
    assert page.tags.count("img") == 3 + 6 + 8
    assert page.tags.count("source") == 8
    assert len(page.addresses) == 17 + 8
    for address in page.addresses:
        header, _, content = address.partition(",")
        assert header in ("data:image/png;base64", "data:image/svg+xml;base64", "data:image/jpeg;base64")
        assert len(base64.b64decode(content, validate=True)) > 100
    assert all(page.alternatives)
    assert len(set(page.alternatives)) == len(page.alternatives)
    assert "Chart: Velocity gap. Student: 0.550 at first, 0.0768 at last." in page.alternatives


def test_nothing_is_loaded_or_run(page: _Page) -> None:
    assert not re.search(r"https?:|file:|//[a-z]|@import|url\(", page.source)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)


def test_what_the_run_holds_is_escaped(page: _Page) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.source
    assert 'name = "<script>alert(1)</script>"' in page.words


def test_labels_of_the_samples_are_explained(page: _Page) -> None:
    assert "Each row is one class. The same place in each grid has the same noise and the same label." in page.words
    assert "Student, 1 step: 10 rows of 6 samples." in page.alternatives


def test_the_commands_name_this_run(page: _Page, full_run: Path) -> None:
    place = f"{full_run.parent.name}/demo"
    options = f"--settings {place}/settings.toml --run {place}-again"
    for command in (
        f"mfd-fast train-teacher {options}\nmfd-fast distill {options}\n",
        f"mfd-fast sample {place} --num 64",
        f"mfd-fast evaluate {place}",
        f"mfd-fast report {place}",
    ):
        assert command in page.words + "\n"


def test_the_commands_of_a_teacher_of_the_users_name_its_factory(empty_run: Path) -> None:
    (empty_run / "settings.toml").write_text("seed = 1")
    (empty_run / "student.json").write_text(json.dumps({"network": {"factory": "mine:build"}}))
    words = _Page(write_report(empty_run)).words
    assert "--teacher mine:build --weights WEIGHTS.safetensors" in words
    assert "train-teacher" not in words


def test_a_teacher_of_another_run_is_taken_from_this_one(empty_run: Path) -> None:
    (empty_run / "settings.toml").write_text("seed = 1")
    (empty_run / "teacher.json").write_text(json.dumps({"model": "mlp"}))
    place = f"{empty_run.parent.name}/{empty_run.name}"
    words = _Page(write_report(empty_run)).words
    assert (
        f"mfd-fast distill --settings {place}/settings.toml --run {place}-again --teacher-run {place}\n" in words + "\n"
    )


def test_an_empty_run_says_in_words_what_is_missing(empty_run: Path) -> None:
    page = _Page(write_report(empty_run))
    for sentence in (
        "Nothing has been recorded in this run folder yet.",
        "There are no evaluated samples yet",
        "This run has not been evaluated yet, so nothing was measured.",
        "There is no log to judge yet.",
        "There is nothing to draw yet",
        "The time of the phases was not recorded.",
        "There is no settings.toml in this run folder.",
    ):
        assert sentence in page.words
    assert page.addresses == []


def test_a_run_that_was_killed_is_reported_with_what_it_left(empty_run: Path) -> None:
    lines = [{"update": i, "role": "student", "loss": 1.0, "velocity_gap": 1 / (i + 1)} for i in range(30)]
    (empty_run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"update": 30, "ro')
    (empty_run / "samples").mkdir()
    (empty_run / "samples" / "update-000000.png").write_bytes(b"\x89PNG broken")
    page = _Page(write_report(empty_run))
    assert "This run has not been evaluated yet; its log ends at update 29 of the distillation." in page.words
    assert "log.jsonl: 1 line that could not be read was left out" in page.words
    assert "samples/update-000000.png could not be read" in page.words
    assert page.alternatives == ["Chart: Velocity gap. Student: 1.00 at first, 0.0333 at last."]


def test_points_are_drawn_in_panels_beside_each_other(empty_run: Path) -> None:
    (empty_run / "evaluation").mkdir()
    points = np.random.default_rng(0).standard_normal((500, 2)).astype(np.float32)
    for stem in ("student-4", "teacher-100", "data"):
        np.savez(empty_run / "evaluation" / f"{stem}.npz", x=points)
    page = _Page(write_report(empty_run))
    titles = ["Teacher, 100 steps", "Student, 4 steps", "Real data"]
    assert page.alternatives == [f"{title}: scatter plot of 500 points." for title in titles]


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ((np.arange(20) % 2, np.arange(20) % 2), "Each row is one class. The same place in each grid"),
        ((np.arange(20) % 2, np.arange(20) % 4), "Each row is one class. The files hold different labels"),
        ((None, None), "The same place in each grid has the same noise."),
    ],
    ids=["same-labels", "other-labels", "no-labels"],
)
def test_grids_are_only_called_paired_when_they_are(empty_run: Path, labels: tuple, sentence: str) -> None:
    (empty_run / "evaluation").mkdir()
    x = np.random.default_rng(0).uniform(-1, 1, (20, 3, 4, 4)).astype(np.float32)
    for stem, label in zip(("teacher-100", "student-1"), labels, strict=True):
        arrays = {"x": x} if label is None else {"x": x, "condition": label}
        np.savez(empty_run / "evaluation" / f"{stem}.npz", **arrays)
    page = _Page(write_report(empty_run))
    assert len(page.alternatives) == 2
    assert sentence in page.words


def test_samples_that_are_no_pictures_are_mentioned(empty_run: Path) -> None:
    (empty_run / "evaluation").mkdir()
    np.savez(empty_run / "evaluation" / "student-1.npz", x=np.zeros((4, 32, 8, 8), np.float32))
    page = _Page(write_report(empty_run))
    assert "have a shape that this page cannot show" in page.words
    assert page.addresses == []


def test_a_large_run_stays_below_two_megabytes(make_run: Callable[[str], Path]) -> None:
    folder = make_run("large")
    x = np.random.default_rng(0).uniform(-1, 1, (200, 3, 64, 64)).astype(np.float32)
    for stem in ("teacher-100", "student-1", "teacher-1", "data"):
        np.savez(folder / "evaluation" / f"{stem}.npz", x=x, condition=np.arange(200) % 10)
    save_image_grid(folder / "samples" / "update-000000.png", x[:64], scale=1)
    noise = np.random.default_rng(0).random
    lines = [
        {"update": i, "role": role, "loss": noise(), "grad_norm": noise(), "velocity_gap": noise(), "sample_std": 1.0}
        | {"velocity_gap_bins": noise(10).tolist()}
        for i in range(1000)
        for role in ("auxiliary", "student")
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = write_report(folder)
    assert path.stat().st_size < 2_000_000
    first_moment = _Page(path).addresses[4]
    assert first_moment.startswith("data:image/jpeg")
    assert len(first_moment) < 41_000


def test_a_failure_leaves_the_old_report(empty_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(empty_run)
    old = path.read_bytes()
    (empty_run / "settings.toml").write_text("new = 1")

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(empty_run)
    assert path.read_bytes() == old
    assert sorted(entry.name for entry in empty_run.iterdir()) == ["report.html", "settings.toml"]


def test_without_jinja_the_extra_is_named(empty_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r'need jinja2.*pip install "mfd_fast\[report\]"'):
        write_report(empty_run)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="run_folder"):
        write_report(tmp_path / "nowhere")
