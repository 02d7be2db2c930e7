"""Compile what `launch_mlp_rollouts` would launch, for GPUs that need not be there: python build_mlp_rollout.py OUT.

A program of its own because Triton's interpreter, where another test needs it, would replace the compiler. The driver
is replaced by one that only names a target, so signatures, specialisations and launch constants are those of real
launches. OUT, JSON, gets a list of objects: capability, resources, whether registers were limited, and `INSTRUCTIONS`.
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

from mfd_fast.kernels import mlp_rollout as kernels

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CAPABILITIES = (80, 86, 89, 90, 100, 120)
INSTRUCTIONS = {"atomics": r"\b(?:atom|red)\.[\w.:]*", "tf32": r"mma[\w.]*tf32", "barriers": r"bar\.sync"}
"""Patterns for PTX."""


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
    """Takes the place of the kernel: compiles where that would launch."""

    def __init__(self, **options: int) -> None:
        self.options, self.built = options, list[dict[str, Any]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.built.append(
            KERNEL.run(*args, grid=grid, warmup=True, **kwargs, **self.options).asm
        )


KERNEL = kernels._mlp_rollout_fwd_kernel


def examine(assembly: dict[str, Any]) -> dict[str, Any]:
    """Registers of a thread, memory in bytes (registers that do not fit are spilled to the stack), and instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        command = [TOOL, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    resources = dict(zip(("registers", "stack", "shared", "local"), map(int, found), strict=True))
    places = {"places": re.findall(r"tt\.addptr .*, tensor<([\dx]+)x(i\d+)>", assembly["ttir"])}
    return (
        resources | places | {name: len(re.findall(pattern, assembly["ptx"])) for name, pattern in INSTRUCTIONS.items()}
    )


def build(**options: int) -> dict[str, Any]:
    """The kernel on the current target."""
    compiling = Compiling(**options)
    kernels._mlp_rollout_fwd_kernel = compiling
    kernels.launch_mlp_rollouts(torch.zeros(64, dtype=torch.int64), 2, 3, 4096)
    kernels._mlp_rollout_fwd_kernel = KERNEL
    (assembly,) = compiling.built
    return examine(assembly)


def main(target: str) -> None:
    driver = Offline()
    triton.runtime.driver.set_active(driver)
    results = []
    for driver.capability in CAPABILITIES:
        results.append({"capability": driver.capability, "starved": False, **build()})
    # With too few registers, so that there are spills to be found.
    results.append({"capability": driver.capability, "starved": True, **build(maxnreg=32)})
    Path(target).write_text(json.dumps(results, indent=1), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
