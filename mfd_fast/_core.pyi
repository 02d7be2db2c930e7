"""Types of the compiled core; see csrc/bindings.cpp."""

from array import array
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Real = TypeVar("Real", np.float32, np.float64)

MLPRollout = tuple[
    array[int],  # widths of slots
    array[int],  # operations
    int,  # how many of them are of time
    int,  # slot of the output
    array[int],  # address and stride of each input of each group
    int,  # groups
    int,  # address and stride of the guidance scales
    int,
    int,  # rows
    int,  # addresses of x, t, r, host_t, host_r
    int,
    int,
    int,
    int,
    float,  # step size, or 0
    int,  # fixed steps
    int,  # most steps, or -1
    bool,  # of two steps
    int,  # addresses of displacement, mean velocity, counts
    int,
    int,
]

HAS_OPENMP: bool
MLP_LANES: list[int]

def mlp_rollout(rollouts: list[MLPRollout], *, threads: int, lanes: int = 0) -> bool: ...
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
