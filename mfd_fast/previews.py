"""What is looked at while a student is trained: pictures of its samples from fixed noise, in ``samples/``."""

import torch

from mfd_fast.data.dataset import all_rows
from mfd_fast.run_folder import RunFolder
from mfd_fast.streams import derive_seed
from mfd_fast.student import Student
from mfd_fast.task import Preview, Task
from mfd_fast.training.distill import SampleHook

GRID_SIDE = 10
"""Rows and columns of the grids of samples that are pictures themselves."""
PREVIEW_ROWS = 4
"""Rows of other samples that are generated at once: the memory is the training's."""


def sample_hook(folder: RunFolder, task: Task, seed: int) -> SampleHook | None:
    """Writes a grid of samples, or of the task's preview; None where nothing can be looked at."""
    if task.preview is not None:
        return _preview_hook(folder, task.preview, seed)
    if task.value_range is None:
        return None
    value_range = task.value_range
    index = torch.arange(GRID_SIDE**2)
    if task.label_counts is not None:
        condition = {"label": index % len(task.label_counts)}
    else:
        condition = {name: rows[index % len(rows)] for name, rows in task.conditions.items()}

    def save(student_updates: int, student: Student) -> None:
        from mfd_fast.report import save_image_grid

        samples = student.sample(GRID_SIDE**2, condition, derive_seed(seed, "grid", 0))
        name = f"update-{student_updates:06d}.png"
        save_image_grid(folder.path / "samples" / name, samples, columns=GRID_SIDE, value_range=value_range)

    return save


def _preview_hook(folder: RunFolder, preview: Preview, seed: int) -> SampleHook:
    """Writes decoded samples of the preview's conditions from fixed noise to ``samples/``."""

    def save(student_updates: int, student: Student) -> None:
        from mfd_fast.report import save_image_grid

        condition = {name: all_rows(rows) for name, rows in preview.conditions.items()}
        count = len(next(iter(condition.values())))
        latents = student.sample(count, condition, derive_seed(seed, "grid", 0), batch_size=PREVIEW_ROWS)
        save_image_grid(folder.path / "samples" / f"update-{student_updates:06d}.png", preview.decode(latents))

    return save
