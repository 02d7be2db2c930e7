"""Compile what the kernels of SANA would launch, for GPUs that need not be there: python build_sana.py OUT.

As build_step_control.py, whose driver and examination it uses.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from build_step_control import CAPABILITIES, Compiling, Offline, examine

from mfd_fast.kernels import gated_depthwise, linear_attention

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def launch_attention(dtype: torch.dtype) -> None:
    """Queries, keys and values of SANA 1.6B as slices of one projection."""
    q, k, v = torch.ones(1, 64, 3 * 2240, dtype=dtype).chunk(3, -1)
    linear_attention.launch_linear_attention(q, k, v, 70)


def launch_depthwise(dtype: torch.dtype) -> None:
    """A few rows of a picture, with the channels of SANA 1.6B."""
    shapes = ((1, 2, 32, 11200), (11200, 1, 3, 3), (11200,))
    gated_depthwise.launch_gated_depthwise(*(torch.ones(shape, dtype=dtype) for shape in shapes))


CASES: dict[str, tuple[ModuleType, Any]] = {
    "linear_attention": (linear_attention, launch_attention),
    "gated_depthwise": (gated_depthwise, launch_depthwise),
}


def build(case: str, dtype: str, **options: int) -> list[dict[str, Any]]:
    """Every kernel that this call launches, on the current target."""
    module, launch = CASES[case]
    kernel = f"_{case}_fwd_kernel"
    before = getattr(module, kernel)
    compiling = Compiling(before, **options)
    setattr(module, kernel, compiling)
    try:
        launch(DTYPES[dtype])
    finally:
        setattr(module, kernel, before)
    return [{"case": case, "dtype": dtype, **examine(assembly)} for assembly in compiling.built]


def main(target: str) -> None:
    driver = Offline()
    triton.runtime.driver.set_active(driver)
    results = []
    for driver.capability in CAPABILITIES:
        for case in CASES:
            for dtype in DTYPES:
                results += [{"capability": driver.capability, **built} for built in build(case, dtype)]
    Path(target).write_text(json.dumps(results, indent=1), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
