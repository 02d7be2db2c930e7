"""The compiled core `mfd_fast._core`, imported on first use; without it the Python definitions run."""

import os
import warnings
from functools import cache
from types import ModuleType


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The core, or None and the reason why it is not there."""
    if os.environ.get("MFD_FAST_CORE") == "0":
        return None, "switched off by the environment variable MFD_FAST_CORE=0"
    try:
        import numpy  # noqa: F401  (tensors reach the core as numpy views)

        from mfd_fast import _core
    except ImportError as error:
        reason = str(error)
        warnings.warn(
            f"the compiled core mfd_fast._core is not available ({reason}); the Python definitions run instead; "
            "reinstall with a C++17 compiler to get it",
            RuntimeWarning,
            stacklevel=3,
        )
        return None, reason
    return _core, None


def core() -> ModuleType | None:
    """The module `mfd_fast._core`, or None where it cannot be imported (then one RuntimeWarning says why).

    The environment variable ``MFD_FAST_CORE=0``, read on the first call, turns the core off without a warning.
    """
    return _load()[0]


def why_no_core() -> str | None:
    """Why `core` gives None, or None if the core is there."""
    return _load()[1]
