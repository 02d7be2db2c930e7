"""Compile what the guided step and the copying of rows would launch, for GPUs that need not be there: python THIS OUT.

A program of its own for the reasons of build_step_control.py, whose driver and tools it uses. OUT, JSON, gets a list of
objects: case, capability, kernel, resources, and the instructions of `PATTERNS` that were found.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from build_step_control import CAPABILITIES, Compiling, Offline, examine

from mfd_fast.kernels import copy_rows, guided_step

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
PATTERNS = {
    "stores": r"st\.global[\w.:]*",
    "fused": r"\bfma\.[\w.]*",
    "roundings": r"\bcvt\.rn\.bf16[\w.]*",
}
"""Patterns for PTX."""
ADDRESSES = {
    "offsets": r"tt\.addptr .*, tensor<\d+x(i\d+)>",
    "narrow_products": r"arith\.muli (.*) : (?:tensor<\d+x)?i32",
}
"""Patterns for Triton's own code: the width of offsets, and products that are made in 32 bits."""


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


def build(case: str, **options: int) -> list[dict[str, Any]]:
    """Every kernel that this call launches, on the current target."""
    results = []
    for module in (guided_step, copy_rows):
        (name,) = (name for name in vars(module) if name.endswith("_kernel"))
        kernel = getattr(module, name)
        compiling = Compiling(kernel, **options)
        setattr(module, name, compiling)
        results.append((module, name, kernel, compiling))
    CASES[case]()
    found = []
    for module, name, kernel, compiling in results:
        setattr(module, name, kernel)
        for assembly in compiling.built:
            patterns = {key: re.findall(pattern, assembly["ptx"]) for key, pattern in PATTERNS.items()}
            patterns |= {key: re.findall(pattern, assembly["ttir"]) for key, pattern in ADDRESSES.items()}
            found.append({"kernel": name, **examine(assembly), **patterns})
    return found


def main(target: str) -> None:
    driver = Offline()
    triton.runtime.driver.set_active(driver)
    results = []
    for driver.capability in CAPABILITIES:
        for case in CASES:
            results += [{"capability": driver.capability, "case": case, **built} for built in build(case)]
    # With too few registers, so that there are spills to be found.
    results += [
        {"capability": driver.capability, "case": "starved", **one} for one in build("rk4-guided-float64", maxnreg=24)
    ]
    Path(target).write_text(json.dumps(results, indent=1), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
