"""Updates that changed nothing because something was not finite: counted, explained, and at some point too many."""

from collections.abc import Callable

import torch

from mfd_fast.training.culprit import Culprit
from mfd_fast.training.distributed import World
from mfd_fast.training.monitor import Monitor

TIME_BINS = 10

ADVICE = (
    "Lower the learning rate, set clip_norm, or compute in float32; if it is always the same sample, look at that one."
)


class Skips:
    """Counts skipped updates of a training; `note` is called by all processes together.

    Args:
        total: skipped before a resume.
        limit: this many in a row are borne.
    """

    def __init__(self, title: str, total: int, limit: int, world: World, monitor: Monitor) -> None:
        self.total, self._in_a_row = total, 0
        self._title, self._limit, self._world, self._monitor = title, limit, world, monitor

    def note(self, update: int, role: str, find: Callable[[], Culprit], skipped: bool) -> None:
        """Take in update number ``update``; ``find`` is called if it was skipped.

        Raises:
            FloatingPointError: more than ``limit`` in a row, or a weight is not finite any more.
        """
        if not skipped:
            self._in_a_row = 0
            return
        self.total += 1
        self._in_a_row += 1
        culprit = self._first_of_all(find())
        time_bin = None if culprit.t is None else min(TIME_BINS - 1, max(0, int(culprit.t * TIME_BINS)))
        self._monitor.log(
            update + 1,
            {
                "event": "skipped update",
                "skipped_role": role,
                "cause": culprit.what,
                "sample": culprit.row,
                "t": culprit.t,
                "time_bin": time_bin,
                "skipped": self.total,
            },
        )
        where = f"the {role} in update {update}: {culprit.words}"
        if self._world.is_main:
            print(
                f"{self._title}: update {update} of the {role} was skipped, its gradient is not finite "
                f"({culprit.words}); {self.total} skipped so far",
                flush=True,
            )
        if culprit.what.startswith("weight"):
            raise FloatingPointError(f"{self._title} cannot go on: {where}. {ADVICE}")
        if self._in_a_row > self._limit:
            raise FloatingPointError(
                f"{self._in_a_row} updates in a row had non-finite gradients (last: {where}). {ADVICE}"
            )

    def _first_of_all(self, own: Culprit) -> Culprit:
        """The culprit with the lowest row among the processes."""
        if self._world.size == 1 or own.what.startswith("weight"):  # weights are the same everywhere
            return own
        nowhere = 2.0**53
        row = nowhere if own.row is None else float(own.row)
        first = self._world.smallest(row)
        if first == nowhere:
            return own
        t, kind = (own.t, float(own.what == "gradient")) if row == first else (None, float("nan"))
        shared = self._world.mean(torch.tensor([float("nan") if t is None else t, kind], dtype=torch.float64))
        found = float(shared[0])
        return Culprit("gradient" if shared[1] > 0 else "loss", int(first), None if found != found else found)
