import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mfd_fast import load_student


def load(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def test_samples_of_digits(cli: Any, finished: Path, tmp_path: Path) -> None:
    result = cli("sample", finished, "--num", "1797", "--seed", "0", "--out", "samples.npz")
    assert (result.code, result.out) == (0, "1797 samples in samples.npz\n")
    arrays = load(tmp_path / "samples.npz")
    assert arrays.keys() == {"x", "condition"}
    assert (arrays["x"].dtype, arrays["x"].shape) == (np.float32, (1797, 1, 8, 8))
    assert (arrays["condition"].dtype, arrays["condition"].shape) == (np.int64, (1797,))
    # The student is hardly trained: without clipping its samples would be as wide as the noise.
    assert (arrays["x"].min(), arrays["x"].max()) == (-1.0, 1.0)
    counts = np.bincount(arrays["condition"], minlength=10) / 1797
    assert np.allclose(counts, 0.1, atol=0.03), "labels are as frequent as in the data"


def test_the_same_seed_gives_the_same_samples(cli: Any, finished: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert cli("sample", finished, "--num", "20", "--seed", seed, "--out", f"{name}.npz").code == 0
    a, b, c = (load(tmp_path / f"{name}.npz") for name in "abc")
    assert all(np.array_equal(a[key], b[key]) for key in a)
    assert not np.array_equal(a["x"], c["x"])
    assert np.array_equal(a["x"], load_student(finished).sample(20, seed=3).numpy()), "and the same as from Python"


def test_one_label_for_all(cli: Any, finished: Path, tmp_path: Path) -> None:
    assert cli("sample", finished, "--num", "5", "--label", "7", "--out", "a.npz").code == 0
    arrays = load(tmp_path / "a.npz")
    assert arrays["condition"].tolist() == [7] * 5
    expected = load_student(finished).sample(5, {"label": torch.tensor([7])})
    assert np.array_equal(arrays["x"], expected.numpy())


def test_a_picture_of_all_samples(cli: Any, finished: Path, tmp_path: Path) -> None:
    result = cli("sample", finished, "--num", "9", "--grid", "new/grid.png", "--out", "a.npz")
    assert (result.code, result.out) == (0, "9 samples in a.npz\npicture in new/grid.png\n")
    with Image.open(tmp_path / "new" / "grid.png") as image:
        assert image.size[0] == image.size[1]
        assert len(set(image.convert("L").tobytes())) > 10


def test_a_student_without_classes(cli: Any, refused: Any, finished_points: Path, tmp_path: Path) -> None:
    assert cli("sample", finished_points, "--num", "6", "--out", "a.npz").code == 0
    arrays = load(tmp_path / "a.npz")
    assert arrays.keys() == {"x"}
    assert arrays["x"].shape == (6, 2)
    assert "--label: this student has no classes" in refused(
        "sample", finished_points, "--label", "1", "--out", "b.npz"
    )
    message = refused("sample", finished_points, "--grid", "b.png", "--out", "b.npz")
    assert "--grid: the samples of this student are no pictures; use --out" in message
    assert not (tmp_path / "b.npz").exists(), "nothing is written when a part is refused"


WRONG = {
    "nothing to write": ([], "nothing to write: give --out samples.npz, --grid samples.png, or --images FOLDER"),
    "no samples": (["--num", "0", "--out", "a.npz"], "--num must be at least 1, got 0"),
    "negative": (["--num", "-3", "--out", "a.npz"], "--num must be at least 1, got -3"),
    "label too high": (["--label", "10", "--out", "a.npz"], "--label must lie in [0, 10), got 10"),
    "label below 0": (["--label", "-1", "--out", "a.npz"], "--label must lie in [0, 10), got -1"),
    "device": (["--device", "gpu", "--out", "a.npz"], "--device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_refused(case: str, refused: Any, finished: Path, tmp_path: Path) -> None:
    options, words = WRONG[case]
    assert words in refused("sample", finished, *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_cuda_that_is_not_there(refused: Any, finished: Path) -> None:
    message = refused("sample", finished, "--device", "cuda", "--out", "a.npz")
    assert "--device is 'cuda', but torch sees no CUDA device" in message


def test_a_run_without_a_student(refused: Any, run: Path) -> None:
    (run / "student.json").unlink()
    assert "run has no student yet" in refused("sample", run, "--out", "a.npz")


def test_a_damaged_student(refused: Any, run: Path) -> None:
    (run / "student.safetensors").write_bytes(b"nonsense")
    assert "student.safetensors is not a valid safetensors file" in refused("sample", run, "--out", "a.npz")
    (run / "student.json").write_text("{}{")
    assert "student.json is not valid JSON" in refused("sample", run, "--out", "a.npz")


def test_a_student_whose_files_do_not_fit(refused: Any, run: Path) -> None:
    description = json.loads((run / "student.json").read_text())
    description["network"]["options"]["width"] = 99
    (run / "student.json").write_text(json.dumps(description))
    # torch reports every weight on a line of its own; here it is one line.
    assert "the weights do not fit the network" in refused("sample", run, "--out", "a.npz")
