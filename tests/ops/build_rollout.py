"""Compile what the guided step and the copying of rows would launch: python build_rollout.py OUT, see offline.py."""

import sys
from collections.abc import Callable

import torch
from offline import write_builds

from mfd_fast.kernels import copy_rows, guided_step

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def step(memories: int, width: int, state: torch.dtype, field: torch.dtype, guided: bool) -> None:
    slots, rows = 64, 48
    x = torch.ones(slots, width, dtype=state)
    memory, coefficients = (
        torch.ones(memories, slots, width, dtype=state),
        torch.ones(5 + 2 * memories, slots, dtype=state),
    )
    velocity = torch.ones(rows, width, dtype=field)
    guidance = torch.ones(rows, dtype=state)
    guided_step.launch_guided_step(
        *(x, x, memory, x.to(field), coefficients, velocity),
        *((velocity, guidance) if guided else (None, None)),
    )


def copy(width: int, source: torch.dtype, target: torch.dtype) -> None:
    rows = torch.arange(48)
    copy_rows.launch_copy_rows(torch.ones(64, width, dtype=source), rows, torch.ones(64, width, dtype=target), rows)


CASES: dict[str, Callable[[], None]] = {
    "euler-float32": lambda: step(0, 32768, F32, F32, False),
    "ab2-guided-bfloat16": lambda: step(1, 32768, F32, BF16, True),
    "rk4-guided-bfloat16": lambda: step(3, 32768, F32, BF16, True),
    "rk4-guided-float64": lambda: step(3, 32768, F64, F64, True),
    "ab2-odd-width": lambda: step(1, 1001, F32, BF16, True),
    "ab2-scalars": lambda: step(1, 1, F32, F32, False),
    "copy-float32-to-bfloat16": lambda: copy(32768, F32, BF16),
    "copy-labels": lambda: copy(1, torch.int64, torch.int64),
}


if __name__ == "__main__":
    write_builds(sys.argv[1], [guided_step, copy_rows], CASES, ("rk4-guided-float64", 24))
