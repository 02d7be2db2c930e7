import base64
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mfd_fast.report.grid import SEPARATOR_VALUE, image_grid, load_picture, picture_uri, save_image_grid


def _ramp(count: int, channels: int = 1, height: int = 2, width: int = 3) -> torch.Tensor:
    return torch.linspace(-1, 1, count * channels * height * width).reshape(count, channels, height, width)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("scale", "line"), [(1, 1), (4, 1), (8, 2)])
def test_each_image_is_at_its_place_and_framed(channels: int, scale: int, line: int) -> None:
    x = _ramp(5, channels)
    grid = image_grid(x, columns=2, scale=scale)
    assert grid.dtype == np.uint8
    assert grid.shape == (3 * (2 * scale + line) + line, 2 * (3 * scale + line) + line, channels)
    covered = np.zeros(grid.shape[:2], dtype=bool)
    for i in range(5):
        top, left = line + (i // 2) * (2 * scale + line), line + (i % 2) * (3 * scale + line)
        place = np.s_[top : top + 2 * scale, left : left + 3 * scale]
        expected = np.rint((x[i].numpy() + 1) / 2 * 255).transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1)
        np.testing.assert_array_equal(grid[place], expected)
        covered[place] = True
    assert (grid[~covered] == SEPARATOR_VALUE).all()


def test_values_follow_the_range_and_are_clipped() -> None:
    x = np.array([0.0, 0.5, 1.0, 2.0, -3.0, np.nan, np.inf, -np.inf], dtype=np.float32).reshape(1, 1, 2, 4)
    pixels = image_grid(x, scale=1, value_range=(0, 1))[1:-1, 1:-1, 0]
    np.testing.assert_array_equal(pixels, [[0, 128, 255, 255], [0, 0, 255, 0]])


def test_small_images_are_enlarged_and_arranged_in_a_square_by_default() -> None:
    assert image_grid(_ramp(9, height=8, width=8)).shape == (3 * 41 + 1, 3 * 41 + 1, 1)
    assert image_grid(_ramp(1, height=64, width=64)).shape == (66, 66, 1)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (_ramp(1, 2), {}, r"x must be images .* got shape \[1, 2, 2, 3\]"),
        (torch.zeros(4, 2), {}, r"x must be images .* got shape \[4, 2\]"),
        (torch.zeros(0, 1, 8, 8), {}, r"x must be images .* got shape \[0, 1, 8, 8\]"),
        (_ramp(1), {"columns": 0}, "columns must be at least 1, got 0"),
        (_ramp(1), {"scale": -2}, "scale must be at least 1, got -2"),
        (_ramp(1), {"value_range": (1, 1)}, r"value_range must be \(low, high\)"),
    ],
    ids=["two-channels", "points", "empty", "columns", "scale", "value-range"],
)
def test_bad_input_is_refused(x: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_grid(x, **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_saved_grid_reads_back_unchanged(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "samples" / "grid.png"
    save_image_grid(path, _ramp(4, channels), columns=2, scale=5)
    np.testing.assert_array_equal(load_picture(path), image_grid(_ramp(4, channels), columns=2, scale=5))
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]


def test_a_small_file_that_claims_a_large_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "JPEG")
    sizes = (0xFFC0).to_bytes(2, "big") + bytes([0, 17, 8])  # then height and width
    path.write_bytes(content.getvalue().replace(sizes + bytes([0, 8, 0, 8]), sizes + bytes([0x62, 0xC2, 0x1A, 0xA4])))
    with pytest.raises(ValueError, match=r"large\.jpg is larger than any picture of a run: .*172423240 pixels"):
        load_picture(path)


def test_a_large_picture_becomes_small_enough() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 700, 3), dtype=np.uint8)
    header, _, content = picture_uri(noise, most_bytes=40_000).partition(",")
    assert header == "data:image/jpeg;base64"
    picture = base64.b64decode(content)
    assert len(picture) <= 40_000
    width, height = Image.open(io.BytesIO(picture)).size
    assert width / height == pytest.approx(700 / 900, rel=0.02)


def test_a_small_picture_stays_exact() -> None:
    grid = image_grid(_ramp(4))
    header, _, content = picture_uri(grid).partition(",")
    assert header == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))), grid[:, :, 0])


def test_an_interrupted_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.png"
    save_image_grid(path, _ramp(1))
    old = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_image_grid(path, _ramp(4))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "mfd_fast\[report\]"'):
        save_image_grid(tmp_path / "grid.png", _ramp(1))
