"""Signals and the time limit end a training after the update under way, with everything saved."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_RESUMABLE = 75
"""Exit code of a run that was stopped from outside and can go on (EX_TEMPFAIL): schedulers may requeue on it."""

PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take a machine away."""
HANG_UP = signal.SIGHUP
"""What comes when a terminal closes, as of an ssh connection that broke."""

Handler = Callable[[int, FrameType | None], object]


class Interrupted(Exception):
    """A signal or the time limit ended a run; it can be resumed.

    ``signal_number`` is None for the time limit.
    """

    def __init__(self, signal_number: int | None, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal.SIGINT if signal_number == signal.SIGINT else EXIT_RESUMABLE
        """130 after Ctrl-C, as shells expect; else `EXIT_RESUMABLE`."""


class StopRequest:
    """Whether somebody asked to stop, and how.

    Args:
        deadline: `time.monotonic` from which on the time is up, or None.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.signal_number: int | None = None
        self._deadline = deadline

    def __bool__(self) -> bool:
        return self.signal_number is not None or self.out_of_time

    @property
    def out_of_time(self) -> bool:
        """Whether the time limit has passed; no change of the system's clock moves it."""
        return self._deadline is not None and time.monotonic() >= self._deadline


@contextmanager
def stop_on_signals(deadline: float | None = None) -> Iterator[StopRequest]:
    """Inside, SIGINT, SIGTERM, SIGUSR1 and SIGHUP are noted; a second SIGINT acts as it always does.

    Where SIGINT was ignored, as shells have it for what they start in the background, a second one raises
    KeyboardInterrupt: whoever sends two to such a process means it.
    SIGHUP stays ignored where it was: that is what nohup does.
    A second one of the others does nothing: launchers pass on what the process has already got. Signals reach only
    the main thread of a process; elsewhere nothing changes.
    """
    request = StopRequest(deadline)
    before = signal.getsignal(signal.SIGINT)
    at_once = signal.default_int_handler if before == signal.SIG_IGN else before

    def note(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, at_once)

    with _handled(dict.fromkeys((signal.SIGINT, *_from_outside()), note)):
        yield request


@contextmanager
def raise_on_preemption() -> Iterator[None]:
    """Inside, and outside of trainings, SIGTERM, SIGUSR1 and SIGHUP (unless that is ignored) raise `Interrupted`:
    nothing needs to be saved there.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, f"stopped by {signal.Signals(number).name} between trainings")

    with _handled(dict.fromkeys(_from_outside(), leave)):
        yield


def _from_outside() -> tuple[signal.Signals, ...]:
    return PREEMPTION if signal.getsignal(HANG_UP) == signal.SIG_IGN else (*PREEMPTION, HANG_UP)


@contextmanager
def _handled(handlers: dict[signal.Signals, Handler]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
