"""IoU and mIoU against OccFM's way of counting, restated voxel by voxel."""

import pytest
import torch
from torch import Tensor

from mfd_fast.metrics.iou import IoUCounter

CLASSES = 5
FREE = CLASSES


def counted_as_occfm_does(forecast: Tensor, truth: Tensor, classes: list[int], ignore: int) -> list[list[float]]:
    """IoU of every class at every horizon, of grids ``[B, F, ...]``: 1 where the truth never shows the class."""
    table = []
    for horizon in range(truth.shape[1]):
        row = []
        for wanted in classes:
            seen = claimed = correct = 0
            for said, was in zip(
                forecast[:, horizon].flatten().tolist(), truth[:, horizon].flatten().tolist(), strict=True
            ):
                if was == ignore:
                    continue
                seen += was == wanted
                claimed += said == wanted
                correct += said == was == wanted
            row.append(1.0 if seen == 0 else correct / (seen + claimed - correct))
        table.append(row)
    return table


def grids(seed: int, rows: int = 3, horizons: int = 4) -> tuple[Tensor, Tensor]:
    """Forecasts that are partly right; class 3 is never in the truth, and class 2 not at the first horizon."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, CLASSES + 1, (rows, horizons, 3, 4, 2), generator=generator)
    truth[truth == 3] = FREE
    truth[:, 0][truth[:, 0] == 2] = FREE
    other = torch.randint(0, CLASSES + 1, truth.shape, generator=generator)
    return torch.where(torch.rand(truth.shape, generator=generator) < 0.5, truth, other), truth


def occupied(labels: Tensor) -> Tensor:
    return (labels != FREE).long()


def test_equals_occfm_class_by_class() -> None:
    forecast, truth = grids(0)
    counter = IoUCounter(4, CLASSES)
    counter.update(forecast, truth)
    found = counter.result()
    table = torch.tensor(counted_as_occfm_does(forecast, truth, list(range(CLASSES)), -100))
    anything = torch.tensor(counted_as_occfm_does(occupied(forecast), occupied(truth), [1], -100))
    torch.testing.assert_close(torch.tensor(found.miou), table.mean(1))
    torch.testing.assert_close(torch.tensor(found.classes), table.mean(0))
    torch.testing.assert_close(torch.tensor(found.iou), anything[:, 0])
    assert found.mean_miou == pytest.approx(table.mean().item())
    assert found.mean_iou == pytest.approx(anything.mean().item())
    assert found.classes[3] == 1.0  # claimed, but never there
    assert table[0, 2] == 1.0
    assert table[1, 2] < 1.0


def test_ignored_voxels_do_not_count() -> None:
    forecast, truth = grids(1)
    truth[torch.rand(truth.shape, generator=torch.Generator().manual_seed(9)) < 0.3] = -100
    counter = IoUCounter(4, CLASSES)
    counter.update(forecast, truth)
    table = torch.tensor(counted_as_occfm_does(forecast, truth, list(range(CLASSES)), -100))
    torch.testing.assert_close(torch.tensor(counter.result().miou), table.mean(1))
    kept = int((truth != -100).sum())
    assert int(counter.counts.sum()) == kept


def test_batches_and_processes_add_up() -> None:
    whole, parts = IoUCounter(4, CLASSES), [IoUCounter(4, CLASSES) for _ in range(2)]
    for seed in range(4):
        forecast, truth = grids(seed)
        whole.update(forecast, truth)
        parts[seed % 2].update(forecast.to(torch.uint8), truth.to(torch.uint8))
    # A mean of the parts' results would be something else.
    assert parts[0].result().mean_miou + parts[1].result().mean_miou != pytest.approx(2 * whole.result().mean_miou)
    parts[0].counts += parts[1].counts
    assert torch.equal(parts[0].counts, whole.counts)
    assert parts[0].result() == whole.result()


def test_many_classes() -> None:
    """Pairs of labels beyond sixteen bits."""
    truth = torch.arange(300, dtype=torch.int16).view(1, 1, 300)
    counter = IoUCounter(1, 299)
    counter.update(truth, truth)
    assert torch.equal(counter.counts[0], torch.eye(300, dtype=torch.int64))


def test_perfect_and_empty() -> None:
    _, truth = grids(0)
    counter = IoUCounter(4, CLASSES)
    counter.update(truth, truth)
    assert counter.result().mean_iou == counter.result().mean_miou == 1.0
    nothing = IoUCounter(4, CLASSES)
    nothing.update(torch.full_like(truth, FREE), truth)
    assert nothing.result().mean_iou == 0.0
    assert nothing.result().iou == [0.0] * 4


@pytest.mark.parametrize(
    ("forecast", "truth", "message"),
    [
        (torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), r"must be \[B, 4, ...\] alike, got \[1, 3, 2\]"),
        (torch.zeros(1, 4, 2), torch.zeros(1, 4, 3), r"alike, got \[1, 4, 2\] and \[1, 4, 3\]"),
        (torch.full((1, 4, 2), 6), torch.zeros(1, 4, 2), "forecast: expected labels from 0 to 5, got 6 to 6"),
        (torch.zeros(1, 4, 2), torch.full((1, 4, 2), -1), "truth: expected labels from 0 to 5, got -1 to -1"),
        # 156 and 65436 are -100 in eight and sixteen bits.
        (torch.zeros(1, 4, 2), torch.full((1, 4, 2), 156, dtype=torch.uint8), "truth: .* got 156 to 156"),
        (torch.zeros(1, 4, 2), torch.full((1, 4, 2), 65436), "truth: .* got 65436 to 65436"),
    ],
)
def test_wrong_grids_are_named(forecast: Tensor, truth: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IoUCounter(4, CLASSES).update(forecast, truth)


def test_wrong_counters_are_refused() -> None:
    for arguments in ((0, 5), (4, 0), (4, 5, 5)):
        with pytest.raises(ValueError, match="horizons and num_classes must be positive and ignore no label"):
            IoUCounter(*arguments)
