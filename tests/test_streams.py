import pytest
import torch

from mfd_fast.intervals import LogitNormal, Uniform
from mfd_fast.streams import EpochOrder, RowDraws, Share, derive_seed, kept_random_state, make_generator

CPU = torch.device("cpu")


def draws(first: int = 0, rows: int = 6, index: int = 0) -> RowDraws:
    return RowDraws(make_generator(0, "test", index), Share(6, first, rows), CPU)


def test_seeds_depend_on_every_part_of_the_key() -> None:
    keys = [(seed, purpose, index) for seed in (0, 1, 12) for purpose in ("a", "b", "a/1") for index in (0, 1, 11)]
    seeds = {derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "a", 0) == derive_seed(0, "a", 0)


def test_seeds_are_the_same_in_every_version() -> None:
    # Runs are resumed by later versions of the package: these numbers may not change.
    assert derive_seed(0, "distill/student", 7) == 1_665_814_071_944_668_249


def test_a_stream_repeats_itself() -> None:
    first, second = (torch.randn(5, generator=make_generator(3, "x", 2)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.randn(5, generator=make_generator(3, "x", 3)))


def test_the_global_generator_is_not_touched() -> None:
    state = torch.get_rng_state()
    part = draws()
    part.normal((3,)), part.uniform(), part.times(LogitNormal()), part.pairs(Uniform(), 0.5)
    EpochOrder(5, 0, "x").indices(0, 7)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_random_state_of_the_caller_is_kept() -> None:
    before = torch.get_rng_state()
    with kept_random_state():
        torch.manual_seed(5)
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("in_use", [False, True])
def test_the_random_state_of_every_gpu_in_use_is_kept(monkeypatch: pytest.MonkeyPatch, in_use: bool) -> None:
    read, written = [], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: read.append(device))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda _, device: written.append(device))
    with kept_random_state():  # warnings are errors, and torch warns of two devices that nobody names
        pass
    assert read == written == [0, 1] * in_use


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_parts_make_up_the_whole(rows: int) -> None:
    whole = draws()
    expected = [whole.normal((2, 3)), whole.uniform(), whole.times(LogitNormal()), *whole.pairs(Uniform(), 0.5)]
    parts: list[list[torch.Tensor]] = []
    for first in range(0, 6, rows):
        part = draws(first, rows)
        assert part.rows == rows
        parts.append([part.normal((2, 3)), part.uniform(), part.times(LogitNormal()), *part.pairs(Uniform(), 0.5)])
    for value, pieces in zip(expected, zip(*parts, strict=True), strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(torch.cat(pieces), value)


def test_draws_have_their_laws() -> None:
    share = Share(20_000, 0, 20_000)
    many = RowDraws(make_generator(0, "laws"), share, CPU)
    normal = many.normal((2,))
    assert normal.shape == (20_000, 2)
    assert normal.mean().item() == pytest.approx(0, abs=0.02)
    assert normal.std().item() == pytest.approx(1, abs=0.02)
    assert many.uniform().mean().item() == pytest.approx(0.5, abs=0.01)
    t, r = many.pairs(Uniform(), 0.25)
    assert bool((t >= r).all())
    assert (t == r).float().mean().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(("total", "first", "rows"), [(4, 0, 0), (4, -1, 2), (4, 2, 3), (4, 4, 1)])
def test_a_share_outside_its_batch_is_refused(total: int, first: int, rows: int) -> None:
    with pytest.raises(ValueError, match="share must lie inside the batch"):
        Share(total, first, rows)


@pytest.mark.parametrize("size", [1, 5, 8])
def test_epochs_are_permutations(size: int) -> None:
    order = EpochOrder(size, 0, "x")
    stream = order.indices(0, 3 * size)
    epochs = [stream[start : start + size].tolist() for start in range(0, 3 * size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 1:
        assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize(("first", "count"), [(0, 1), (3, 4), (4, 12), (13, 2), (2, 0)])
def test_a_position_is_always_the_same_index(first: int, count: int) -> None:
    stream = EpochOrder(5, 0, "x").indices(0, 20)
    order = EpochOrder(5, 0, "x")
    order.indices(17, 3)
    if count:
        assert torch.equal(order.indices(first, count), stream[first : first + count])
    assert not torch.equal(EpochOrder(5, 1, "x").indices(0, 20), stream)
    assert not torch.equal(EpochOrder(5, 0, "y").indices(0, 20), stream)
