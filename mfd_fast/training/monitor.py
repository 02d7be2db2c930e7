"""What a training says while it runs: a progress bar, a JSON line per logged update, TensorBoard events."""

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mfd_fast.storage import write_text

Value = int | float | str | Sequence[float | None] | None


class Monitor:
    """Writes only when ``enabled`` (the main process); a resumed log loses the lines after the resumed update."""

    def __init__(
        self, log: Path, *, title: str, total: int, start: int, seconds: float, tensorboard: Path | None, enabled: bool
    ) -> None:
        from tqdm import tqdm

        self._began = time.monotonic() - seconds
        self._file: TextIO | None = None
        self._events: Any = None
        # On a terminal a bar; elsewhere about twenty plain lines, so that a log file stays readable.
        self._bar: Any = tqdm(total=total, initial=start, desc=title, unit="update", disable=None if enabled else True)
        self._plain_every = max(1, math.ceil(total / 20)) if enabled and self._bar.disable else 0
        self._title, self._total = title, total
        self._shown: dict[str, float] = {}
        self.unheard = False
        """Whether the reader of a pipe that was printed to has gone, as of ``| head``."""
        if enabled:
            cut_log(log, start)
            self._file = log.open("a", encoding="utf-8")
            if tensorboard is not None and importlib.util.find_spec("tensorboard") is not None:
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(tensorboard), purge_step=start + 1)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return time.monotonic() - self._began

    def log(self, update: int, values: Mapping[str, Value]) -> None:
        """Write one line ``{"update": ..., "seconds": ..., **values}``; non-finite numbers become null."""
        if self._file is None:
            return
        line = {"update": update, "seconds": round(self.seconds, 3), **{k: _plain(v) for k, v in values.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        prefix = f"{values['role']}/" if "role" in values else ""
        for name, value in line.items():
            if self._events is not None and name not in ("update", "seconds") and isinstance(value, int | float):
                self._events.add_scalar(prefix + name, value, update)

    def advance(self, update: int, shown: Mapping[str, float]) -> None:
        """Move the bar to ``update`` updates done; the figures shown last stay beside it.

        A terminal or a reader that has gone is no reason to lose the update: from then on output goes nowhere.
        """
        self._shown |= shown
        try:
            self._show(update)
        except OSError as error:
            self.unheard = isinstance(error, BrokenPipeError)
            silence(sys.stdout if self._bar.disable else sys.stderr)

    def _show(self, update: int) -> None:
        if self._plain_every and (update % self._plain_every == 0 or update == self._total):
            figures = "".join(f", {name} {value:.4g}" for name, value in self._shown.items())
            left = self._bar.format_interval(self.seconds / max(1, update) * (self._total - update))
            print(f"{self._title}: {update}/{self._total} updates{figures}, about {left} left", flush=True)
        if not self._bar.disable:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in self._shown.items()}, refresh=False)
            self._bar.update(update - self._bar.n)

    def close(self) -> None:
        """Finish the bar and the files."""
        self._bar.close()
        if self._events is not None:
            self._events.close()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def silence(stream: TextIO) -> None:
    """Let all that is still printed to ``stream``, and what it holds back, go nowhere."""
    with open(os.devnull, "w") as nowhere, suppress(OSError, ValueError):  # not every stream is a file
        os.dup2(nowhere.fileno(), stream.fileno())


def cut_log(log: Path, update: int) -> None:
    """Drop the lines of updates after ``update``, and a line that a killed run left unfinished."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if not log.exists():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["update"] <= update:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    write_text(log, "".join(kept))


def _plain(value: Value) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
