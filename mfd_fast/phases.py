"""Wall and CPU seconds of the phases of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    """Collects seconds per phase; CPU seconds are those of all threads of this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside under ``name``; a phase that is entered again goes on."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            self.seconds[name] = round(self.seconds.get(name, 0.0) + wall, 3)
            self.cpu_seconds[name] = round(self.cpu_seconds.get(name, 0.0) + cpu, 3)
