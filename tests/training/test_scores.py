"""Scores of checkpoints: what they belong to, and what is kept because of them."""

from pathlib import Path

import pytest
import torch

from mfd_fast.storage import read_json, write_json
from mfd_fast.training.checkpoint import list_checkpoints, prune_checkpoints, save_checkpoint
from mfd_fast.training.scores import SCORES, Score, best_kept, best_names, read_scores, write_score

HOW = "distance of points, 60 samples, seed 0"


def save(folder: Path, update: int, keep: int = 10, spared: list[str] | None = None) -> Path:
    tensors = {"student": {"a": torch.full((2,), float(update))}}
    return save_checkpoint(folder, update, tensors, {"done": update}, keep, spared=spared or ())


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Four checkpoints, the second the best, the first one not measured."""
    for update, distance in ((1, None), (2, 0.1), (3, 0.5), (4, 0.3)):
        path = save(tmp_path, update)
        if distance is not None:
            write_score(path, Score(distance, HOW))
    return tmp_path


def test_the_best_come_first(scored: Path) -> None:
    assert best_names(scored) == ["update-000002", "update-000004", "update-000003"]
    assert read_scores(scored)["update-000004"] == Score(0.3, HOW)


def test_a_score_is_of_the_content_and_not_of_the_name(scored: Path) -> None:
    manifest = scored / "update-000002" / "manifest.json"
    write_json(manifest, read_json(manifest) | {"update": 7})
    assert best_names(scored) == ["update-000004", "update-000003"]


def test_pruning_keeps_the_newest_and_the_best(scored: Path) -> None:
    gone = prune_checkpoints(scored, 1, spared=best_names(scored)[:1])
    assert [path.name for path in gone] == ["update-000003", "update-000001"][::-1]
    assert names(scored) == ["update-000002", "update-000004"]


def test_a_training_that_goes_on_keeps_the_best(scored: Path) -> None:
    for update in range(5, 9):
        save(scored, update, keep=1, spared=best_kept(scored))
    assert names(scored) == ["update-000002", "update-000008"]
    assert best_kept(scored) == ["update-000002"]


def test_a_damaged_best_is_not_kept_in_place_of_a_whole_one(scored: Path) -> None:
    (scored / "update-000002" / "state.json").write_text("{}")
    prune_checkpoints(scored, 1, spared=best_names(scored)[:1])
    assert names(scored) == ["update-000004"]


def test_scores_of_different_kinds_are_not_compared(scored: Path) -> None:
    write_score(scored / "update-000001", Score(0.01, "distance of points, 6 samples, seed 0"))
    with pytest.raises(
        ValueError, match=r"scores of different kinds are not comparable: .* 6 samples.*; .* 60 samples"
    ):
        best_names(scored)
    assert best_kept(scored) == []


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"update-000002": 3}', '{"a": {"distance": 1e999, "how": "x", "manifest": ""}}', '{"a": {"how": 1}}'],
)
def test_damaged_scores_are_refused_and_stop_no_training(content: str, scored: Path) -> None:
    (scored / SCORES).write_text(content)
    with pytest.raises(ValueError, match=r"scores\.json"):
        best_names(scored)
    assert best_kept(scored) == []


def test_what_is_not_finite_is_no_score(scored: Path) -> None:
    with pytest.raises(ValueError, match=r"update-000001: its distance is nan, which is no score"):
        write_score(scored / "update-000001", Score(float("nan"), HOW))
