"""Grids of small images as arrays, PNG files and data URIs."""

import base64
import io
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mfd_fast.report.extras import missing_extra
from mfd_fast.storage import write_file

if TYPE_CHECKING:
    from PIL.Image import Image

SEPARATOR_VALUE = 128
SMALLEST_SIDE = 40
"""Images are enlarged by a whole factor until their longer side has at least this many pixels."""


def image_grid(
    x: Tensor | NDArray[np.floating],
    columns: int | None = None,
    scale: int | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> NDArray[np.uint8]:
    """Images ``x`` ``[N, C, H, W]`` side by side, row after row, as uint8 ``[H', W', C]`` with C 1 or 3.

    Every image is enlarged ``scale`` times by repeating pixels and framed by grey lines of width
    ``s = max(1, scale // 4)``, so image i has its top left pixel in row ``s + (i // columns) * (scale * H + s)`` and
    column ``s + (i % columns) * (scale * W + s)``. Values outside ``value_range`` are clipped, NaN
    becomes the lowest value. Places without an image stay grey.

    Raises:
        ValueError: x is not ``[N, 1 or 3, H, W]`` or is empty; columns or scale below 1; an empty value_range.
    """
    images = _as_images(x)
    count, channels, height, width = images.shape
    columns = min(count, math.ceil(math.sqrt(count))) if columns is None else columns
    scale = max(1, math.ceil(SMALLEST_SIDE / max(height, width))) if scale is None else scale
    for name, value in (("columns", columns), ("scale", scale)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    pixels = _to_pixels(images, value_range).transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)
    line = max(1, scale // 4)
    row_pitch, column_pitch = scale * height + line, scale * width + line
    rows = math.ceil(count / columns)
    grid = np.full((rows * row_pitch + line, columns * column_pitch + line, channels), SEPARATOR_VALUE, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = line + (i // columns) * row_pitch, line + (i % columns) * column_pitch
        grid[top : top + scale * height, left : left + scale * width] = image
    return grid


def save_image_grid(
    path: Path | str,
    x: Tensor | NDArray[np.floating],
    columns: int | None = None,
    scale: int | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> None:
    """Write `image_grid` of the same arguments to ``path`` as a PNG, whole or not at all."""
    content = encode(image_grid(x, columns, scale, value_range), "PNG")

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_file(Path(path), write)


def encode(pixels: NDArray[np.uint8], file_format: str) -> bytes:
    """The bytes of a ``PNG`` or ``JPEG`` file that shows ``pixels`` ``[H, W, 1 or 3]``."""
    return _encode_image(_to_image(pixels), file_format)


def picture_uri(pixels: NDArray[np.uint8], most_bytes: int = 160_000) -> str:
    """A data URI of ``pixels`` ``[H, W, 1 or 3]``: a PNG if it is small enough, else a JPEG, shrunk until it is."""
    content = encode(pixels, "PNG")
    if len(content) <= most_bytes:
        return data_uri(content, "image/png")
    image = _to_image(pixels)
    content = _encode_image(image, "JPEG")
    while len(content) > most_bytes and min(image.size) > 16:
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4))
        content = _encode_image(image, "JPEG")
    return data_uri(content, "image/jpeg")


def load_picture(path: Path) -> NDArray[np.uint8]:
    """The pixels ``[H, W, 1 or 3]`` of a picture file; OSError or ValueError when it cannot be read or is too large."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    # From memory: a length in the file beyond its end then allocates nothing.
    content = io.BytesIO(path.read_bytes())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(content)
        kind = "L" if image.mode in ("1", "L") else "RGB"
        pixels: NDArray[np.uint8] = np.asarray(image if image.mode == kind else image.convert(kind), dtype=np.uint8)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} is larger than any picture of a run: {error}") from error
    return pixels if pixels.ndim == 3 else np.expand_dims(pixels, 2)


def data_uri(content: bytes, media_type: str) -> str:
    """``content`` as a ``data:`` address that can stand in an HTML attribute."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def _as_images(x: Tensor | NDArray[np.floating]) -> NDArray[np.float32]:
    array = x.detach().float().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x, dtype=np.float32)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"x must be images [N, 1 or 3, H, W] with N, H, W at least 1, got shape {list(array.shape)}")
    images: NDArray[np.float32] = array.astype(np.float32, copy=False)
    return images


def _to_pixels(images: NDArray[np.float32], value_range: tuple[float, float]) -> NDArray[np.uint8]:
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range must be (low, high) with low < high, got {value_range}")
    shares = (np.nan_to_num(images, nan=low, posinf=high, neginf=low) - low) / (high - low)
    pixels: NDArray[np.uint8] = np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8)
    return pixels


def _to_image(pixels: NDArray[np.uint8]) -> "Image":
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _encode_image(image: "Image", file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **({"quality": 88} if file_format == "JPEG" else {"optimize": True}))
    return buffer.getvalue()
