"""IoU and mIoU of forecast occupancy, horizon by horizon, as OccFM measures them.

Of every class and horizon three numbers are counted over all grids: voxels of the class in the truth (seen), in the
forecast (claimed) and in both (correct); ``IoU = correct / (seen + claimed - correct)``. mIoU is the mean over the
classes without "free"; IoU is the same for "anything but free" as one class. A class that the truth never shows at a
horizon counts as 1 there, claimed or not. Averages over horizons are plain means.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class IoU(NamedTuple):
    """What was measured, from 0 to 1."""

    iou: list[float]
    """Of anything against nothing, by horizon."""
    miou: list[float]
    """Mean over classes, by horizon."""
    classes: list[float]
    """By class, mean over horizons."""

    @property
    def mean_iou(self) -> float:
        """Mean of ``iou`` over horizons."""
        return sum(self.iou) / len(self.iou)

    @property
    def mean_miou(self) -> float:
        """Mean of ``miou`` over horizons."""
        return sum(self.miou) / len(self.miou)


class IoUCounter:
    """Counts over any number of batches; counts of several processes add up (``counts`` is one tensor).

    Args:
        horizons: future frames.
        num_classes: classes, labels 0 to ``num_classes - 1``; the label ``num_classes`` is free.
        ignore: voxels that have this label in the truth are not counted.
    """

    def __init__(self, horizons: int, num_classes: int, ignore: int = -100) -> None:
        if horizons < 1 or num_classes < 1 or 0 <= ignore <= num_classes:
            raise ValueError(
                f"horizons and num_classes must be positive and ignore no label, got {horizons}, {num_classes} and "
                f"{ignore}"
            )
        self.num_classes, self.ignore = num_classes, ignore
        self.counts = torch.zeros(horizons, num_classes + 1, num_classes + 1, dtype=torch.int64)
        """Voxels by horizon, label in the truth and label in the forecast."""

    def update(self, forecast: Tensor, truth: Tensor) -> None:
        """Count a batch of grids ``[B, horizons, ...]`` of labels, on any device; ValueError for wrong ones."""
        if forecast.shape != truth.shape or forecast.shape[1:2] != self.counts.shape[:1]:
            raise ValueError(
                f"forecast and truth must be [B, {len(self.counts)}, ...] alike, got {list(forecast.shape)} and "
                f"{list(truth.shape)}"
            )
        labels = self.num_classes + 1
        narrow = torch.int16 if labels**2 <= 1 << 15 else torch.int64  # a third of the time, over 640 thousand voxels
        for horizon in range(len(self.counts)):
            expected, claimed = truth[:, horizon].flatten(), forecast[:, horizon].flatten()
            ignored = expected.to(torch.promote_types(expected.dtype, torch.int16)) == self.ignore
            if ignored.any():
                expected, claimed = expected[~ignored], claimed[~ignored]
            for name, values in (("forecast", claimed), ("truth", expected)):
                low, high = (int(end) for end in values.aminmax()) if len(values) else (0, 0)
                if not 0 <= low <= high < labels:
                    raise ValueError(f"{name}: expected labels from 0 to {labels - 1}, got {low} to {high}")
            pairs = torch.bincount(expected.to(narrow) * labels + claimed.to(narrow), minlength=labels**2)
            self.counts[horizon] += pairs.view(labels, labels).cpu()

    def result(self) -> IoU:
        """IoU and mIoU of everything counted so far."""
        counts = self.counts.double()
        filled = counts[:, : self.num_classes]
        by_class = _ratio(
            filled.sum(2), counts.sum(1)[:, : self.num_classes], filled.diagonal(dim1=1, dim2=2)
        )  # [horizons, classes]
        both = filled[:, :, : self.num_classes].sum((1, 2))
        occupied = _ratio(filled.sum((1, 2)), counts[:, :, : self.num_classes].sum((1, 2)), both)
        return IoU(occupied.tolist(), by_class.mean(1).tolist(), by_class.mean(0).tolist())


def _ratio(seen: Tensor, claimed: Tensor, correct: Tensor) -> Tensor:
    return torch.where(seen > 0, correct / (seen + claimed - correct).clamp(min=1), 1.0)
