"""Compile what `launch_step_control` would launch: python build_step_control.py OUT, see offline.py."""

import sys
from functools import partial

import torch
from offline import write_builds

from mfd_fast.kernels import step_control

CASES = {
    "64-float32": (64, torch.float32),
    "100-float32": (100, torch.float32),
    "32768-float32": (32768, torch.float32),
    "64-float64": (64, torch.float64),
    "32768-float64": (32768, torch.float64),
}
"""Elements a row: the longest that takes one launch; a piece that is not a multiple of 16; a long row."""

SETTINGS = {"rtol": 0.1, "atol": 0.1, "max_step": 1.0, "safety": 0.9, "min_factor": 0.2, "max_factor": 5.0}


def launch(width: int, dtype: torch.dtype) -> None:
    row, x, status = torch.ones(96, dtype=dtype), torch.ones(96, width, dtype=dtype), torch.ones(96, dtype=torch.int64)
    step_control.launch_step_control(row, row, row, status, row, x, x, x, error_order=3, **SETTINGS)


if __name__ == "__main__":
    launches = {name: partial(launch, *case) for name, case in CASES.items()}
    write_builds(sys.argv[1], [step_control], launches, ("64-float32", 24))
