import signal
import threading

import pytest

from mfd_fast.training.interrupts import Interrupted, stop_on_signals

WATCHED = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", WATCHED)
def test_the_first_signal_is_noted(number: int) -> None:
    before = {watched: signal.getsignal(watched) for watched in WATCHED}
    with stop_on_signals() as stop:
        assert not stop
        signal.raise_signal(number)
        assert stop
        assert stop.signal_number == number
        after_first = {watched: signal.getsignal(watched) for watched in WATCHED}
    assert after_first == before, "a second signal acts as it always does"
    assert {watched: signal.getsignal(watched) for watched in WATCHED} == before


def test_a_second_interrupt_stops_at_once() -> None:
    def interrupt_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        interrupt_twice()


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def fail() -> None:
        raise KeyError(signal.getsignal(signal.SIGTERM))

    with pytest.raises(KeyError) as caught, stop_on_signals():
        fail()
    assert caught.value.args[0] != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with stop_on_signals() as stop:
            seen.append((bool(stop), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_exit_code_is_what_shells_expect() -> None:
    assert Interrupted(signal.SIGTERM, "x").exit_code == 143
    assert Interrupted(signal.SIGINT, "x").exit_code == 130
