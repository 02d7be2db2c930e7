"""``mfd-fast evaluate`` of a folder of pictures."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_pictures


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = write_pictures(tmp_path / "pictures", 6)
    (folder / "prompts.txt").write_text("a\nb\nc\nd\ne\nf\n")
    return folder


def test_a_table_and_a_file(cli: Any, pictures: Path, models: Path, tmp_path: Path) -> None:
    (pictures / "7.png").write_text("no picture")
    with (pictures / "prompts.txt").open("a") as file:
        file.write("g\n")
    reference = write_pictures(tmp_path / "reference", 6, seed=3)
    arguments = ("--metrics", "clip,dinov2", "--models", models, "--reference", reference, "--device", "cpu")
    result = cli("evaluate", pictures, *arguments)
    assert result.code == 0, result.err
    report = json.loads((pictures / "metrics.json").read_text())
    assert report["count"] == 6
    assert f"{report['metrics']['clip']['mean']:.4f}" in result.out
    assert f"{report['metrics']['dinov2']['distance']:.4f}" in result.out
    assert "left out: 7.png" in result.out
    assert "1 broken pictures were left out" in result.err
    again = cli("evaluate", pictures, *arguments, "--out", tmp_path / "again.json", "--batch-size", "6")
    assert again.code == 0
    assert (tmp_path / "again.json").is_file()


def test_a_model_of_ones_own(cli: Any, pictures: Path, models: Path) -> None:
    result = cli("evaluate", pictures, "--metrics", f"clip={models / 'clip'}", "--device", "cpu")
    assert result.code == 0, result.err
    assert json.loads((pictures / "metrics.json").read_text())["metrics"]["clip"]["model"] == str(models / "clip")


def test_refusals(refused: Any, pictures: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    assert "--metrics: name what to measure" in refused("evaluate", pictures)
    assert "expected any of clip" in refused("evaluate", pictures, "--metrics", "fid")
    assert "clip is named twice" in refused("evaluate", pictures, "--metrics", "clip,clip")
    missing = refused("evaluate", pictures, "--metrics", "pickscore", "--models", models, "--device", "cpu")
    assert "yuvalkirstain/PickScore_v1 is not on this machine; --download fetches it" in missing
    head = refused("evaluate", pictures, "--metrics", f"aesthetic={models / 'clip'}", "--device", "cpu")
    assert "lacks files of the model" in head
    (tmp_path / "bare").mkdir()
    assert "is not a run folder" in refused("evaluate", tmp_path / "bare")
    assert "has no pictures" in refused("evaluate", tmp_path / "bare", "--metrics", "clip")
    assert "--labels is for a run" in refused("evaluate", pictures, "--labels", "x")
    assert "--out: expected a file" in refused("evaluate", pictures, "--metrics", "clip", "--out", tmp_path)
    assert not (pictures / "metrics.json").exists()


def test_options_of_pictures_are_refused_for_a_run(refused: Any, run: Path) -> None:
    assert "--metrics is for a folder of pictures" in refused("evaluate", run, "--metrics", "clip")


def test_a_missing_extra(refused: Any, pictures: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = refused("evaluate", pictures, "--metrics", "clip", "--models", models, "--device", "cpu")
    assert 'transformers, which is not installed: pip install "mfd_fast[metrics]"' in message
