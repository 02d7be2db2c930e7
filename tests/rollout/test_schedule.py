"""Which row is computed when: the C++ core against its definitions, and what longest-first refill saves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfd_fast import native
from mfd_fast.intervals import Uniform, sample_pairs
from mfd_fast.rollout.plan import bucket, buckets, make_schedule, schedule_reference
from mfd_fast.rollout.program import program_of
from mfd_fast.rollout.table import Intervals, columns, tabulate, tabulate_reference
from mfd_fast.solvers import SOLVERS
from mfd_fast.step_control import FixedSteps

needs_core = pytest.mark.skipif(native.core() is None, reason="needs the C++ core")


def test_longest_first_by_hand() -> None:
    schedule = make_schedule(torch.tensor([2, 5, 1, 3, 3]), 2)
    assert schedule.order.tolist() == [1, 3, 4, 0, 2]
    # 5 beside 3 then 3; the 2 follows the 5, the 1 follows the second 3. Both slots end after 7.
    assert schedule.begin.tolist() == [5, 0, 6, 0, 3]
    assert schedule.slot.tolist() == [0, 0, 1, 1, 1]
    assert schedule.live == [2] * 7


def test_with_room_for_all_finished_rows_fall_off_the_end() -> None:
    schedule = make_schedule(torch.tensor([2, 5, 1, 3, 3]), 9)
    assert schedule.slot[schedule.order].tolist() == list(range(5))
    assert schedule.begin.tolist() == [0] * 5
    assert schedule.live == [5, 4, 3, 1, 1]
    assert make_schedule(torch.zeros(0, dtype=torch.int64), 3).live == []


@needs_core
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=40), st.integers(1, 12))
def test_core_matches_definition(lengths: list[int], slots: int) -> None:
    found, expected = (
        make(torch.tensor(lengths, dtype=torch.int64), slots) for make in (make_schedule, schedule_reference)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 8))
def test_every_schedule_is_sound(lengths: list[int], slots: int) -> None:
    """No slot does two things at once, slots only go idle from the end, and Graham's bound holds."""
    schedule = make_schedule(torch.tensor(lengths), slots)
    busy: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        begin = int(schedule.begin[row])
        busy.setdefault(int(schedule.slot[row]), []).extend(range(begin, begin + length))
    for slot, evaluations in busy.items():
        assert sorted(evaluations) == [e for e, live in enumerate(schedule.live) if live > slot]
    assert sum(schedule.live) == sum(lengths)
    assert len(schedule.live) <= max(lengths) + sum(lengths) / slots


@pytest.mark.parametrize(("rows", "slots", "gain"), [(8, 4, 1.54), (16, 4, 1.74), (64, 8, 2.06), (64, 16, 2.27)])
def test_what_refill_saves_over_lock_step(rows: int, slots: int, gain: float) -> None:
    """Euler steps of 0.02 on uniform pairs: network calls of full batches until the slowest row is done, over ours."""
    generator = torch.Generator().manual_seed(0)
    lock_step = refilled = 0
    for _ in range(400):
        t, r = sample_pairs(Uniform(), rows, generator=generator)
        steps = FixedSteps(0.02).count(t, r).clamp(min=1)
        lock_step += int(steps.view(-1, slots).max(1).values.sum())
        refilled += len(make_schedule(steps, slots).live)
    assert lock_step / refilled == pytest.approx(gain, rel=0.03)


def test_buckets() -> None:
    assert buckets([1, 2, 3, 5, 9, 16, 17, 24, 25, 41], 999) == [1, 2, 4, 8, 16, 16, 24, 24, 32, 48]
    assert bucket(9, 11) == 11
    assert all(bucket(rows, 99) >= rows for rows in range(1, 99))


@needs_core
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SOLVERS)
def test_table_of_the_core_matches_its_definition(name: str, dtype: torch.dtype) -> None:
    solver, generator = SOLVERS[name], torch.Generator().manual_seed(0)
    t, r = torch.rand(2, 11, generator=generator, dtype=torch.float64)
    steps = torch.randint(0, 6, (11,), generator=generator)
    r[steps == 0] = t[steps == 0]
    run = torch.minimum(steps, torch.tensor(4))
    length = torch.tensor([max(1, solver.evaluations(int(count))) for count in run])
    intervals, program = Intervals(t, r, steps, run, length), program_of(solver)
    schedule = make_schedule(length, 4)
    height = columns(program.memories)
    for first, count in ((0, len(schedule.live)), (3, 5)):
        given = (program, schedule, intervals, first, count, 6, dtype)
        found, expected = tabulate(*given), tabulate_reference(*given)
        assert found.shape == (count, height, 6)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
    assert torch.equal(found[:, 1].sum(1).long(), torch.tensor(schedule.live[3:8]))


@needs_core
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(sorted(SOLVERS)),
    rows=st.integers(1, 30),
    slots=st.integers(1, 9),
    most=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_any_part_of_any_table_matches_its_definition(
    seed: int, name: str, rows: int, slots: int, most: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    solver, generator = SOLVERS[name], torch.Generator().manual_seed(seed)
    t, r = torch.rand(2, rows, generator=generator, dtype=torch.float64)
    steps = torch.randint(0, 8, (rows,), generator=generator)
    r[steps == 0] = t[steps == 0]
    run = torch.minimum(steps, torch.tensor(most))
    length = torch.tensor([max(1, solver.evaluations(int(count))) for count in run])
    schedule = make_schedule(length, slots)
    first = data.draw(st.integers(0, len(schedule.live) - 1))
    count = data.draw(st.integers(1, len(schedule.live) - first))
    given = (program_of(solver), schedule, Intervals(t, r, steps, run, length), first, count, slots, dtype)
    assert torch.equal(tabulate(*given), tabulate_reference(*given))


@needs_core
def test_core_refuses_what_would_leave_the_table() -> None:
    core = native.core()
    assert core is not None
    with pytest.raises(ValueError, match="slots at least 1"):
        core.schedule(torch.tensor([1]).numpy(), 0)
    with pytest.raises(ValueError, match="lengths must not be negative"):
        core.schedule(torch.tensor([-1]).numpy(), 1)
    with pytest.raises(TypeError):
        core.schedule(torch.tensor([1.0]).numpy(), 1)
    one, time = torch.zeros(1, dtype=torch.int64).numpy(), torch.zeros(1, dtype=torch.float64).numpy()

    def fill(table: torch.Tensor, slot: int = 0, stores: list[int] | None = None) -> None:
        core.tabulate(
            *(table.numpy(), one + slot, one, one + 1, time, time, one, one, [0.0, 1.0], stores or [-1, -1]),
            [[1.0, 0.0], [1.0, 0.0]],
            start=1,
            first=0,
        )

    fill(torch.zeros(2, 5, 3))
    for bad, message in (
        (lambda: fill(torch.zeros(2, 5, 3), slot=3), "slot must be within table"),
        (lambda: fill(torch.zeros(2, 4, 3)), "table must have shape"),
        (lambda: fill(torch.zeros(2, 5, 3), stores=[-1]), "one entry for each"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
