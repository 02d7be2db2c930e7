import base64
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from mfd_fast.report import figures
from mfd_fast.report.record import RunRecord, read_run
from mfd_fast.report.scatter import scatter_figure
from mfd_fast.report.series import gap_map, summarise
from mfd_fast.report.theme import DARK, LIGHT, drawing_style, figure_uri, new_figure, themed_uris

DRAWINGS = [
    figures.distance_figure,
    figures.velocity_gap_figure,
    figures.gap_map_figure,
    figures.auxiliary_loss_figure,
    figures.gradient_norm_figure,
    figures.spread_figure,
    figures.teacher_loss_figure,
    figures.seconds_figure,
]


@pytest.fixture(scope="module")
def record(full_run: Path) -> RunRecord:
    return read_run(full_run)


@pytest.mark.parametrize("draw", DRAWINGS, ids=lambda draw: draw.__name__)
def test_axes_are_labelled_and_nothing_is_drawn_of_an_empty_run(
    draw: Callable, record: RunRecord, empty_run: Path
) -> None:
    with drawing_style(LIGHT):
        figure = draw(record, LIGHT)
        assert figure.axes[0].get_xlabel()
        assert figure.axes[0].get_ylabel() or draw is figures.seconds_figure
        assert draw(read_run(empty_run), LIGHT) is None


def test_the_distance_figure_shows_the_measured_points(record: RunRecord) -> None:
    with drawing_style(LIGHT):
        axes = figures.distance_figure(record, LIGHT).axes[0]
    points = [line.get_xydata().tolist() for line in axes.lines]
    assert points[:2] == [[[1, 375.2], [10, 8.41], [100, 2.1]], [[1, 1.93]]]
    assert axes.lines[2].get_ydata()[0] == 0.85
    assert axes.get_yscale() == "log"
    assert {"teacher 375", "student 1.93"} <= {text.get_text() for text in axes.texts}
    assert axes.get_title(loc="left").endswith("two halves of the real data 0.850")


@pytest.mark.parametrize("floor", [5.0, 1.01, 0.3], ids=["above", "between", "below"])
def test_no_label_of_the_distance_figure_lies_on_another_or_on_the_dashed_line(floor: float, record: RunRecord) -> None:
    metrics = {"teacher": {"1": 9.92, "10": 0.819, "100": 0.64}, "student": {"1": 0.733}, "data_half_half": floor}
    with drawing_style(LIGHT):
        figure = figures.distance_figure(dataclasses.replace(record, metrics=metrics), LIGHT)
        figure.canvas.draw()
        axes = figure.axes[0]
        boxes = [text.get_window_extent() for text in [*axes.texts, axes._left_title]]
        height = axes.transData.transform((1, floor))[1]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.y0 < height < box.y1 for box in boxes)


def test_the_velocity_gap_is_on_a_logarithmic_axis_and_leaves_zeros_out(record: RunRecord) -> None:
    zero = {"update": 121, "role": "student", "velocity_gap": 0.0}
    with drawing_style(LIGHT):
        figure = figures.velocity_gap_figure(
            dataclasses.replace(record, student_log=[*record.student_log, zero]), LIGHT
        )
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert len(axes.lines[0].get_xdata()) == 40


def test_equal_ends_get_labels_one_above_the_other(record: RunRecord) -> None:
    lines = [{"update": i, "grad_norm": 1.0 + i} for i in range(5)]
    with drawing_style(LIGHT):
        record = dataclasses.replace(record, auxiliary_log=lines, student_log=lines)
        labels = figures.gradient_norm_figure(record, LIGHT).axes[0].texts
    assert [label.get_text().split("\n")[0] for label in labels] == ["auxiliary", "student"]
    assert labels[1].xyann[1] - labels[0].xyann[1] > 25


def test_phases_are_stacked_to_their_total(record: RunRecord) -> None:
    with drawing_style(LIGHT):
        axes = figures.seconds_figure(record, LIGHT).axes[0]
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == [31, 83, 60, 460]
    assert {text.get_text().strip() for text in axes.texts} == {"6 min 40 s", "83 s", "7 min 40 s"}


def test_scatter_panels_share_limits_and_have_the_colour_of_their_role() -> None:
    points = np.random.default_rng(0).standard_normal((100, 2)).astype(np.float32)
    with drawing_style(LIGHT):
        figure = scatter_figure({"Teacher, 100 steps": points, "Student, 1 step": 2 * points, "Data": points}, LIGHT)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Teacher, 100 steps", "Student, 1 step", "Data"]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in figure.axes}) == 1
    assert figure.axes[0].get_xlim()[1] > np.percentile(2 * points[:, 0], 99)
    colours = [to_hex(axes.collections[0].get_facecolor()[0]) for axes in figure.axes]
    assert colours == [LIGHT.teacher, LIGHT.student, LIGHT.data]


@pytest.mark.parametrize("panels", [{}, {"teacher": np.zeros((3, 3), np.float32)}], ids=["none", "three-dimensions"])
def test_scatter_refuses_what_are_not_points(panels: dict) -> None:
    with pytest.raises(ValueError, match="panels"):
        scatter_figure(panels, LIGHT)


def test_summaries_are_short_and_leave_out_what_is_not_finite() -> None:
    values = np.r_[np.full(500, 1.0), np.nan, np.inf, np.full(500, 3.0)]
    series = summarise(np.arange(1002.0), values, most_points=10)
    assert len(series.middle) == 10
    np.testing.assert_array_equal(series.middle, [1.0] * 5 + [3.0] * 5)
    assert series.update[0] == pytest.approx(49.5)
    assert len(summarise(np.array([]), np.array([])).middle) == 0


def test_a_summary_spans_the_middle_of_the_values() -> None:
    series = summarise(np.arange(101.0), np.arange(101.0), most_points=1)
    assert (series.low[0], series.middle[0], series.high[0]) == (10, 50, 90)


def test_the_gap_map_keeps_bins_without_samples_blank() -> None:
    lines = [{"update": i, "velocity_gap_bins": [None, float(i), 2.0 if i < 1 else None]} for i in range(4)]
    table = gap_map(lines, most_points=2)
    np.testing.assert_array_equal(table.gap, [[np.nan, np.nan], [0.5, 2.5], [2.0, np.nan]])
    assert (table.first, table.last) == (0, 3)


@pytest.mark.parametrize("bins", [[[None, None]], [[1.0], [1.0, 2.0]], [3]], ids=["blank", "uneven", "no-list"])
def test_no_gap_map_of_unusable_bins(bins: list) -> None:
    assert gap_map([{"update": i, "velocity_gap_bins": entry} for i, entry in enumerate(bins)]) is None


def test_themes_differ_and_the_users_settings_are_left_alone(record: RunRecord) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"text.color": "red", "svg.hashsalt": "mine"}):
        light, dark = themed_uris(lambda theme: figures.velocity_gap_figure(record, theme))
        assert (mpl.rcParams["text.color"], mpl.rcParams["svg.hashsalt"]) == ("red", "mine")
    texts = [base64.b64decode(uri.partition(",")[2]).decode() for uri in (light, dark)]
    assert LIGHT.student in texts[0]
    assert DARK.student in texts[1]
    assert DARK.student not in texts[0]
    assert themed_uris(lambda theme: figures.velocity_gap_figure(record, theme)) == (light, dark)


def test_a_figure_of_many_points_becomes_a_png() -> None:
    with drawing_style(LIGHT):
        figure, (axes,) = new_figure()
        axes.plot([0, 1])
        assert figure_uri(figure).startswith("data:image/svg+xml;base64,")
        axes.scatter(*np.random.default_rng(0).random((2, 3000)))
        assert figure_uri(figure).startswith("data:image/png;base64,")


@pytest.mark.parametrize("module", ["matplotlib", "matplotlib.figure"])
def test_without_matplotlib_the_extra_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "mfd_fast\[report\]"'):
        themed_uris(lambda theme: new_figure()[0])
