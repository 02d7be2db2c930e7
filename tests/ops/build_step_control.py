"""Compile what `launch_step_control` would launch, for GPUs that need not be there: python build_step_control.py OUT.

A program of its own because Triton's interpreter, where another test needs it, would replace the compiler. The driver
is replaced by one that only names a target, so signatures, specialisations and launch constants are those of real
launches. OUT, JSON, gets a list of objects: case, capability, kernel, resources, and `INSTRUCTIONS` that were found.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from mfd_fast.kernels import step_control as kernels

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CAPABILITIES = (80, 86, 89, 90, 100, 120)
CASES = {
    "64-float32": (64, torch.float32),
    "100-float32": (100, torch.float32),
    "32768-float32": (32768, torch.float32),
    "64-float64": (64, torch.float64),
    "32768-float64": (32768, torch.float64),
}
"""Elements a row: the longest that takes one launch; a piece that is not a multiple of 16; a long row."""

INSTRUCTIONS = {
    "loads": r"ld\.global[\w.:]*",
    "atomics": r"\b(?:atom|red)\.[\w.:]*",
    "maxima": r"\bmax\.[\w.]*f32",
    "matrix": r"\b(?:mma|wgmma|tcgen05)[\w.]*mma\w*|\bmma\.sync[\w.]*",
    "float_parameters": r"\.param \.(f\d+)",
}
"""Patterns for PTX."""

SETTINGS = {"rtol": 0.1, "atol": 0.1, "max_step": 1.0, "safety": 0.9, "min_factor": 0.2, "max_factor": 5.0}


class Offline:
    """A driver without a device; the capability is its number, so Triton caches the targets apart."""

    capability = 0

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Compiling:
    """Takes the place of a kernel: compiles where that would launch."""

    def __init__(self, kernel: Any, **options: int) -> None:
        self.kernel, self.options, self.built = kernel, options, list[dict[str, Any]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.built.append(
            self.kernel.run(*args, grid=grid, warmup=True, **kwargs, **self.options).asm
        )


def examine(assembly: dict[str, Any]) -> dict[str, Any]:
    """Registers of a thread, memory in bytes (registers that do not fit are spilled to the stack), and instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        command = [TOOL, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    resources = dict(zip(("registers", "stack", "shared", "local"), map(int, found), strict=True))
    found = {name: re.findall(pattern, assembly["ptx"]) for name, pattern in INSTRUCTIONS.items()}
    # Before any optimisation that might narrow what it knows to be small.
    places = re.findall(r"tt\.addptr .*, tensor<([\dx]+)x(i\d+)>", assembly["ttir"])
    return resources | found | {"places": places, "offsets": [bits for _, bits in places]}


def build(case: str, **options: int) -> list[dict[str, Any]]:
    """Every kernel that this call launches, on the current target."""
    width, dtype = CASES[case]
    names = [name for name in vars(kernels) if name.endswith("_kernel")]
    replaced = {name: getattr(kernels, name) for name in names}
    compiling = {name: Compiling(kernel, **options) for name, kernel in replaced.items()}
    vars(kernels).update(compiling)
    row, x, status = torch.ones(96, dtype=dtype), torch.ones(96, width, dtype=dtype), torch.ones(96, dtype=torch.int64)
    kernels.launch_step_control(row, row, row, status, row, x, x, x, error_order=3, **SETTINGS)
    vars(kernels).update(replaced)
    return [{"kernel": name, **examine(assembly)} for name in names for assembly in compiling[name].built]


def main(target: str) -> None:
    driver = Offline()
    triton.runtime.driver.set_active(driver)
    results = []
    for driver.capability in CAPABILITIES:
        for case in CASES:
            results += [{"capability": driver.capability, "case": case, **built} for built in build(case)]
    # With too few registers, so that there are spills to be found.
    results += [{"capability": driver.capability, "case": "starved", **one} for one in build("64-float32", maxnreg=24)]
    Path(target).write_text(json.dumps(results, indent=1), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
