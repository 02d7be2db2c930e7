import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mfd_fast.training.interrupts import Interrupted, raise_on_preemption, stop_on_signals

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """SIGINT and SIGHUP as in a program that a terminal runs; in the background or under nohup they are ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    inherited = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in inherited.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", WATCHED)
def test_the_first_signal_is_noted(number: int) -> None:
    before = {watched: signal.getsignal(watched) for watched in WATCHED}
    with stop_on_signals() as stop:
        assert not stop
        signal.raise_signal(number)
        assert stop
        assert stop.signal_number == number
        assert (signal.getsignal(signal.SIGINT) == before[signal.SIGINT]) == (number == signal.SIGINT)
    assert {watched: signal.getsignal(watched) for watched in WATCHED} == before


@pytest.mark.parametrize("earlier", [signal.default_int_handler, signal.SIG_IGN], ids=["usual", "ignored"])
def test_a_second_interrupt_stops_at_once(earlier: Any) -> None:
    signal.signal(signal.SIGINT, earlier)

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


def test_a_hang_up_that_is_ignored_stays_so() -> None:
    """Under nohup a run goes on when the terminal closes."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with raise_on_preemption(), stop_on_signals() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_what_launchers_send_twice_acts_once(number: int) -> None:
    with stop_on_signals() as stop:
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop.signal_number == number


def test_exit_codes() -> None:
    assert Interrupted(signal.SIGINT, "x").exit_code == 130
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, None):
        assert Interrupted(number, "x").exit_code == 75


def test_the_time_limit_goes_by_a_clock_that_nobody_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1e12)
    with stop_on_signals(105.0) as stop:
        assert not stop
        now[0] = 105.0
        assert stop
        assert stop.signal_number is None


def test_between_trainings_preemption_leaves_at_once() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    seen = []

    def work() -> None:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGUSR1)
            seen.append(bool(stop))
        signal.raise_signal(signal.SIGUSR1)

    with pytest.raises(Interrupted, match="stopped by SIGUSR1 between trainings") as caught, raise_on_preemption():
        work()
    assert seen == [True]
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGUSR1) == before
