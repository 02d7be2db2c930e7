"""Writing a file whole or not at all, and the error for a missing extra."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` by way of a temporary file beside it; on any failure the old file stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def missing_extra(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error to raise from ``error`` when a library of the ``report`` extra is not installed."""
    message = f'pictures and reports need {error.name}, which is not installed: pip install "mfd_fast[report]"'
    return ModuleNotFoundError(message, name=error.name)
