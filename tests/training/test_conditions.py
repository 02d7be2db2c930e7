import pytest
import torch

from mfd_fast.streams import Share
from mfd_fast.training.conditions import ConditionTable

CPU = torch.device("cpu")


def drawn(table: ConditionTable, batch: int, updates: int, shares: int = 1) -> list[list[int]]:
    rows = batch // shares
    return [
        [
            value
            for share in range(shares)
            for value in table.draw(update, Share(batch, share * rows, rows), CPU)["label"].tolist()
        ]
        for update in range(updates)
    ]


@pytest.mark.parametrize(("size", "batch"), [(12, 4), (10, 4), (3, 8), (7, 7)])
def test_every_row_comes_once_in_an_epoch(size: int, batch: int) -> None:
    table = ConditionTable({"label": torch.arange(size)}, None, seed=0)
    stream = [value for update in drawn(table, batch, 12) for value in update]
    epochs = [stream[first : first + size] for first in range(0, len(stream) - size + 1, size)]
    assert len(epochs) >= 2
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 3:
        assert epochs[0] != epochs[1], "epochs are shuffled differently"


@pytest.mark.parametrize("shares", [2, 4])
def test_rows_do_not_depend_on_how_a_batch_is_split(shares: int) -> None:
    table = ConditionTable({"label": torch.arange(10)}, None, seed=0)
    assert drawn(table, 8, 6, shares) == drawn(ConditionTable({"label": torch.arange(10)}, None, 0), 8, 6)


def test_an_update_is_the_same_whenever_it_is_asked_for() -> None:
    rows = {"label": torch.arange(10)}
    everything = drawn(ConditionTable(rows, None, 0), 4, 9)
    late = ConditionTable(rows, None, 0).draw(7, Share(4, 0, 4), CPU)["label"].tolist()
    assert late == everything[7]
    assert drawn(ConditionTable(rows, None, 1), 4, 9) != everything, "another seed, another order"


def test_labels_are_as_frequent_as_in_the_data() -> None:
    label = torch.tensor([0] * 6 + [1] * 3 + [2])
    stream = [value for update in drawn(ConditionTable({"label": label}, None, 0), 5, 20) for value in update]
    assert [stream.count(value) for value in range(3)] == [60, 30, 10]


def test_tensors_of_a_row_stay_together() -> None:
    rows = {"label": torch.arange(9), "context": torch.arange(9.0).view(9, 1) * 10}
    part = ConditionTable(rows, None, 0).draw(3, Share(6, 2, 3), CPU)
    assert part["context"].shape == (3, 1)
    assert (part["context"].flatten() / 10).tolist() == part["label"].tolist()


def test_no_conditions() -> None:
    table = ConditionTable({}, None, 0)
    assert table.draw(0, Share(4, 0, 4), CPU) == {}
    assert table.negative(CPU) is None


def test_negative_condition_is_handed_on() -> None:
    negative = ConditionTable({"label": torch.arange(3)}, {"label": torch.tensor([3])}, 0).negative(CPU)
    assert negative is not None
    assert negative["label"].tolist() == [3]


@pytest.mark.parametrize(
    "rows", [{"a": torch.zeros(3), "b": torch.zeros(4)}, {"a": torch.zeros(0, 2)}], ids=["different", "empty"]
)
def test_rows_that_do_not_fit_are_refused(rows: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="same number of rows, above 0"):
        ConditionTable(rows, None, 0)


class _ReadLater:
    """Rows that are not in memory."""

    shape, dtype = (6, 2), torch.float32

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return torch.stack([index.float(), -index.float()], 1)


def test_rows_may_be_read_when_they_are_drawn() -> None:
    table = ConditionTable({"past": _ReadLater(), "label": torch.arange(6)}, None, seed=0)
    drawn = table.draw(3, Share(4, 0, 4), CPU)
    assert torch.equal(drawn["past"][:, 0].long(), drawn["label"])
    assert torch.equal(drawn["past"][:, 1], -drawn["past"][:, 0])
    with pytest.raises(ValueError, match=r"same number of rows, above 0, got \[5, 6\]"):
        ConditionTable({"past": _ReadLater(), "label": torch.arange(5)}, None, seed=0)
