"""Types of the compiled core; see csrc/bindings.cpp."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Real = TypeVar("Real", np.float32, np.float64)

HAS_OPENMP: bool

def advance(
    t: NDArray[Real],
    step: NDArray[Real],
    previous_error: NDArray[Real],
    status: NDArray[np.int64],
    r: NDArray[Real],
    x: NDArray[Real],
    candidate: NDArray[Real],
    error: NDArray[Real],
    *,
    error_order: int,
    rtol: float,
    atol: float,
    max_step: float,
    safety: float,
    min_factor: float,
    max_factor: float,
    threads: int,
) -> tuple[NDArray[Real], NDArray[Real], NDArray[Real], NDArray[np.int64], NDArray[np.bool_]]: ...
def schedule(
    lengths: NDArray[np.int64], slots: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]: ...
def tabulate(
    table: NDArray[Real],
    slot: NDArray[np.int64],
    begin: NDArray[np.int64],
    length: NDArray[np.int64],
    t: NDArray[np.float64],
    r: NDArray[np.float64],
    steps: NDArray[np.int64],
    run: NDArray[np.int64],
    positions: Sequence[float],
    stores: Sequence[int],
    coefficients: Sequence[Sequence[float]],
    *,
    start: int,
    first: int,
) -> None: ...
