import sys
import threading
import time
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mfd_fast import native
from mfd_fast.ops.step_control import advance_reference
from mfd_fast.step_control import AdaptiveSteps


@pytest.fixture
def forgotten_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The core as before its first use."""
    monkeypatch.delenv("MFD_FAST_CORE", raising=False)
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@pytest.fixture
def missing_core(forgotten_core: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("mfd_fast._core", raising=False)
    monkeypatch.setitem(sys.modules, "mfd_fast._core", None)


def advance_arguments() -> dict[str, object]:
    row, matrix = np.ones(2, np.float32), np.ones((2, 3), np.float32)
    arrays = {"t": row, "step": -row, "previous_error": row, "status": np.full(2, 4), "r": 0 * row}
    options = {"rtol": 0.1, "atol": 0.1, "max_step": 1.0, "safety": 0.9, "min_factor": 0.2, "max_factor": 5.0}
    return arrays | {"x": matrix, "candidate": matrix, "error": matrix} | options | {"error_order": 3, "threads": 1}


@pytest.mark.usefixtures("forgotten_core")
def test_core_is_there() -> None:
    core = native.core()
    assert core is not None, native.why_no_core()
    assert core.__name__ == "mfd_fast._core"
    assert native.why_no_core() is None
    assert native.core() is core


@pytest.mark.usefixtures("missing_core")
def test_missing_core_warns_once_and_the_definition_runs() -> None:
    control = AdaptiveSteps()
    state = control.start(torch.ones(2), torch.zeros(2))
    x, error = torch.ones(2, 3), torch.full((2, 3), 0.005)
    with pytest.warns(RuntimeWarning, match=r"mfd_fast\._core is not available \(.+\); the Python definitions run"):
        after = control.advance(state, torch.zeros(2), x, x, error, 3)
    expected = advance_reference(control, state, torch.zeros(2), x, x, error, 3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, expected, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.core() is None
        assert "_core" in str(native.why_no_core())


@pytest.mark.usefixtures("missing_core")
def test_switched_off_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFD_FAST_CORE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.core() is None
        assert "MFD_FAST_CORE=0" in str(native.why_no_core())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": np.ones(3, np.float32)}, ValueError, r"step must have shape \[2\]"),
        ({"t": np.ones((2, 1), np.float32)}, ValueError, r"t must have shape \[2\]"),
        ({"status": np.ones(1, np.int64)}, ValueError, r"status must have shape \[2\]"),
        ({"x": np.ones((3, 3), np.float32)}, ValueError, "x must have as many rows"),
        ({"candidate": np.ones((2, 4), np.float32)}, ValueError, "candidate must have the shape of x"),
        ({"error": np.ones(2, np.float32)}, ValueError, "error must have the shape of x"),
        ({"error_order": 0}, ValueError, "error_order must be at least 1"),
        ({"threads": 0}, ValueError, "threads must be at least 1"),
        ({"x": np.ones((2, 3), np.float64)}, TypeError, "incompatible function arguments"),
        ({"error": np.ones((2, 6), np.float32)[:, ::2]}, TypeError, "incompatible function arguments"),
    ],
    ids=["step", "t", "status", "x", "candidate", "error", "order", "threads", "dtype", "layout"],
)
def test_core_refuses(change: dict[str, object], error: type[Exception], message: str) -> None:
    core = native.core()
    assert core is not None
    core.advance(**advance_arguments())
    with pytest.raises(error, match=message):
        core.advance(**(advance_arguments() | change))


def test_core_releases_the_interpreter_lock() -> None:
    """Another Python thread makes progress while the core works."""
    core = native.core()
    assert core is not None
    matrix = np.ones((2, 2_000_000), np.float32)
    arguments = advance_arguments() | {"x": matrix, "candidate": matrix, "error": matrix}
    ticks, done = 0, False

    def tick() -> None:
        nonlocal ticks
        while not done:
            ticks += 1
            time.sleep(1e-5)

    def ticks_during_the_call() -> int:
        before = ticks
        core.advance(**arguments)
        return ticks - before

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=tick)
    # Longer than the test: this thread gives the lock away only where it releases it itself.
    sys.setswitchinterval(100.0)
    try:
        thread.start()
        assert any(ticks_during_the_call() > 0 for _ in range(100))
    finally:
        sys.setswitchinterval(interval)
        done = True
        thread.join()
