"""What is looked at while a student is trained whose samples are no pictures themselves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from mfd_fast.data.dataset import all_rows
from mfd_fast.run_folder import RunFolder
from mfd_fast.streams import derive_seed
from mfd_fast.student import Student
from mfd_fast.types import Rows

ROWS = 4
"""Rows that are sampled at once: the memory is the training's."""


@dataclass(frozen=True)
class Preview:
    """Samples to look at."""

    conditions: Mapping[str, Rows]
    """Rows to sample for, always with the same noise."""
    decode: Callable[[Tensor], Tensor]
    """Pictures ``[N, 3, H, W]`` in [-1, 1] from samples; what it needs it loads and lets go."""


def preview_hook(folder: RunFolder, preview: Preview, seed: int) -> Callable[[int, Student], None]:
    """Writes decoded samples of the preview's conditions from fixed noise to ``samples/``."""

    def save(student_updates: int, student: Student) -> None:
        from mfd_fast.report import save_image_grid

        condition = {name: all_rows(rows) for name, rows in preview.conditions.items()}
        count = len(next(iter(condition.values())))
        latents = student.sample(count, condition, derive_seed(seed, "grid", 0), batch_size=ROWS)
        save_image_grid(folder.path / "samples" / f"update-{student_updates:06d}.png", preview.decode(latents))

    return save
