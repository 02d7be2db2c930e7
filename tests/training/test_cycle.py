import pytest

from mfd_fast.training.distill import Cycle

CYCLES = [(10, 1), (2, 3), (0, 1), (0, 2), (50, 20), (1, 1)]


def test_ten_auxiliary_updates_then_one_of_the_student() -> None:
    cycle = Cycle(10, 1)
    roles = [cycle.role(update) for update in range(22)]
    assert roles == (["auxiliary"] * 10 + ["student"]) * 2


def test_several_student_updates_in_a_cycle() -> None:
    cycle = Cycle(2, 3)
    letters = "".join(cycle.role(update)[0] for update in range(12))
    assert letters == "aasssaasssaa"


@pytest.mark.parametrize(("auxiliary", "student"), CYCLES)
def test_student_updates_counts_roles(auxiliary: int, student: int) -> None:
    cycle = Cycle(auxiliary, student)
    roles = [cycle.role(update) for update in range(200)]
    assert [cycle.student_updates(done) for done in range(200)] == [
        roles[:done].count("student") for done in range(200)
    ]


@pytest.mark.parametrize(("auxiliary", "student"), CYCLES)
def test_total_is_the_shortest_course_with_so_many_student_updates(auxiliary: int, student: int) -> None:
    cycle = Cycle(auxiliary, student)
    for wanted in range(1, 45):
        total = cycle.total(wanted)
        assert cycle.student_updates(total) == wanted
        assert cycle.role(total - 1) == "student"


@pytest.mark.parametrize(("auxiliary", "student"), CYCLES)
def test_no_student_updates_is_no_training(auxiliary: int, student: int) -> None:
    assert Cycle(auxiliary, student).total(0) == 0


def test_settings_of_the_paper() -> None:
    assert Cycle(10, 1).total(1000) == 11_000
    assert [Cycle(50, 20).total(wanted) for wanted in (19, 20, 21)] == [69, 70, 121]
