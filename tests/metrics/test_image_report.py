"""A folder of pictures measured as a whole."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import prepared, write_pictures

from mfd_fast.metrics import frechet_distance, precision_recall
from mfd_fast.metrics.image_folder import check_pictures, list_pictures, read_picture, read_prompts
from mfd_fast.metrics.image_report import image_report, table
from mfd_fast.metrics.model_sources import Source, find_source


def _sources(models: Path, *names: str) -> dict[str, Source]:
    return {name: find_source(name, models) for name in names}


def test_names_are_ordered_by_their_numbers(tmp_path: Path) -> None:
    for name in ("10.png", "9.PNG", "a2.webp", "a10.jpg", "1.jpeg", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_pictures(tmp_path)] == ["1.jpeg", "9.PNG", "10.png", "a2.webp", "a10.jpg"]


def test_distance_to_itself_and_to_others(models: Path, tmp_path: Path) -> None:
    a, b = write_pictures(tmp_path / "a", 30), write_pictures(tmp_path / "b", 30, seed=1, shade=0.3)
    same = image_report(a, _sources(models, "dinov2"), reference=a)["metrics"]["dinov2"]
    assert same["distance"] == pytest.approx(0, abs=1e-6)
    assert (same["precision"], same["recall"]) == (1.0, 1.0)
    apart = image_report(b, _sources(models, "dinov2"), reference=a, batch_size=7)["metrics"]["dinov2"]
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(models / "dinov2", local_files_only=True)
    with torch.no_grad():
        real, made = (
            model(torch.stack([prepared(read_picture(path)) for path in list_pictures(folder)])).pooler_output
            for folder in (a, b)
        )
    assert apart["distance"] == pytest.approx(frechet_distance(made, real), rel=1e-3)
    assert apart["distance"] > 2 * apart["reference_half_half"] > 0
    assert (apart["precision"], apart["recall"]) == tuple(precision_recall(real, made))


def test_batches_do_not_matter_and_means_are_of_all(models: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 5)
    (folder / "prompts.txt").write_text("a cat\nb\nc\nd\ne\n\n")
    one = image_report(folder, _sources(models, "clip"), batch_size=2)
    all_at_once = image_report(folder, _sources(models, "clip"), batch_size=100)
    scores = [entry["clip"] for entry in one["pictures"].values()]
    assert scores == pytest.approx([entry["clip"] for entry in all_at_once["pictures"].values()], rel=1e-3, abs=1e-3)
    result = one["metrics"]["clip"]
    mean = sum(scores) / 5
    spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / 4)
    assert result["mean"] == pytest.approx(mean)
    assert (result["spread"], result["standard_error"]) == pytest.approx((spread, spread / math.sqrt(5)))
    assert one["pictures"]["0.png"]["prompt"] == "a cat"
    assert f"{mean:.4f}" in table(one)[1]


def test_prompts_by_name_and_broken_pictures(models: Path, tmp_path: Path) -> None:
    """A broken picture keeps its prompt to itself: the others are matched as if it were whole."""
    folder = write_pictures(tmp_path / "pictures", 4)
    (folder / "prompts.txt").write_text("a cat\nred dog\nsea\nx\n")
    whole = image_report(folder, _sources(models, "clip"))["pictures"]
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
    report = image_report(folder, _sources(models, "clip"))
    assert report["broken"].keys() == {"1.png"}
    assert report["count"] == 3
    for name in ("0.png", "2.png", "3.png"):
        assert report["pictures"][name]["clip"] == pytest.approx(whole[name]["clip"], abs=1e-3)
    assert "left out: 1.png: " in table(report)[-1]
    lines = [
        json.dumps({"file_name": f"{i}.png", "prompt": text}) for i, text in ((3, "x"), (1, "y"), (0, "z"), (2, "w"))
    ]
    (tmp_path / "by_name.jsonl").write_text("\n".join(lines))
    named = image_report(folder, _sources(models, "clip"), prompts=tmp_path / "by_name.jsonl")["pictures"]
    assert {name: entry["prompt"] for name, entry in named.items()} == {"0.png": "z", "2.png": "w", "3.png": "x"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a\nb\n", "has 2 prompts for 3 pictures"),
        ("p.txt", "a\n\nc\n", "line 2 is empty"),
        ("p.txt", "\udcff", "not UTF-8"),
        ("p.jsonl", '{"file_name": "0.png", "prompt": "a"}\n', "no prompt for 2 of 3 pictures, the first is 1.png"),
        ("p.jsonl", '{"prompt": "a"}\n', 'line 1: expected {"file_name"'),
        ("p.jsonl", "not json\n", "line 1: expected"),
        ("p.jsonl", '{"file_name": "0.png", "prompt": "a"}\n' * 2, "line 2: a second prompt for 0.png"),
        (
            "p.jsonl",
            "\n".join(f'{{"file_name": "{i}.png", "prompt": "a"}}' for i in range(4)),
            "prompts for 1 pictures that are not there, as 3.png",
        ),
    ],
)
def test_prompts_that_do_not_match(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name, ["0.png", "1.png", "2.png"])


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no pictures"):
        check_pictures(tmp_path)
    with pytest.raises(NotADirectoryError, match="nowhere is not a folder"):
        check_pictures(tmp_path / "nowhere")
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"none of the 1 pictures .* can be read; a.png: "):
        check_pictures(tmp_path)


def test_what_does_not_go_together(models: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 3)
    with pytest.raises(ValueError, match="clip: need a prompt for every picture"):
        image_report(folder, _sources(models, "clip"))
    with pytest.raises(ValueError, match="reference pictures and the metrics"):
        image_report(folder, _sources(models, "dinov2"))
    with pytest.raises(ValueError, match="reference pictures and the metrics"):
        image_report(folder, _sources(models, "clip"), reference=folder)
    with pytest.raises(ValueError, match="at least 4 readable pictures to compare, got 3"):
        image_report(folder, _sources(models, "dinov2"), reference=folder)
    with pytest.raises(ValueError, match="at least one of"):
        image_report(folder, {})
    with pytest.raises(ValueError, match="got 'fid'"):
        image_report(folder, {"fid": find_source("clip", models)})
    shutil.copy(folder / "0.png", folder / "3.png")
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        image_report(folder, _sources(models, "dinov2"), reference=folder, batch_size=0)


def test_sources(models: Path, tmp_path: Path) -> None:
    assert find_source("clip").model == "openai/clip-vit-large-patch14"
    assert find_source("clip", models).model == str(models / "clip")
    assert find_source("pickscore", models).model == "yuvalkirstain/PickScore_v1"
    assert find_source("clip", models, "openai/clip-vit-base-patch32").processor == "openai/clip-vit-base-patch32"
    assert find_source("hpsv2", None, "someone/hps").extra is None
    with pytest.raises(FileNotFoundError, match="neither a folder nor the id"):
        find_source("clip", None, "./nowhere")
    with pytest.raises(FileNotFoundError, match="--models: there is no folder"):
        find_source("clip", tmp_path / "nowhere")
    for name in ("a.pt", "b.pth"):
        (tmp_path / "hpsv2").mkdir(exist_ok=True)
        (tmp_path / "hpsv2" / name).touch()
    with pytest.raises(ValueError, match=r"expected one file of weights .* got a.pt, b.pth"):
        find_source("hpsv2", tmp_path)
