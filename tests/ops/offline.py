"""Compiling Triton kernels for GPUs that need not be there; what the programs build_*.py of this folder share.

They are programs of their own because Triton's interpreter, where another test needs it, would replace the compiler.
The driver is replaced by one that only names a target, so signatures, specialisations and launch constants are those of
real launches.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CAPABILITIES = (80, 86, 89, 90, 100, 120)
INSTRUCTIONS = {
    "loads": r"ld\.global[\w.:]*",
    "stores": r"st\.global[\w.:]*",
    "atomics": r"\b(?:atom|red)\.[\w.:]*",
    "barriers": r"bar\.sync",
    "maxima": r"\bmax\.[\w.]*f32",
    "fused": r"\bfma\.[\w.]*",
    "roundings": r"\bcvt\.rn\.bf16[\w.]*",
    "matrix": r"\b(?:mma|wgmma|tcgen05)[\w.]*mma\w*|\bmma\.sync[\w.]*",
    "tf32": r"mma[\w.]*tf32",
    "float_parameters": r"\.param \.(f\d+)",
}
"""Patterns for PTX."""
NARROW_PRODUCTS = r"arith\.muli (.*) : (?:tensor<\d+x)?i32"
"""Products that Triton's own code makes in 32 bits."""
Builds = list[dict[str, Any]]


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
        def compile_only(*args: Any, **kwargs: Any) -> None:
            found = self.kernel.run(*args, grid=grid, warmup=True, **kwargs, **self.options)
            self.built.append({**found.asm, "launch_shared": found.metadata.shared})

        return compile_only


def examine(assembly: dict[str, Any]) -> dict[str, Any]:
    """Registers of a thread, memory in bytes (registers that do not fit are spilled to the stack), `INSTRUCTIONS`,
    `NARROW_PRODUCTS`, and shape and width of all places in memory.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        command = [TOOL, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    resources = dict(zip(("registers", "stack", "shared", "local"), map(int, found), strict=True))
    instructions = {name: re.findall(pattern, assembly["ptx"]) for name, pattern in INSTRUCTIONS.items()}
    # Before any optimisation that might narrow what it knows to be small.
    places = re.findall(r"tt\.addptr .*, tensor<([\dx]+)x(i\d+)>", assembly["ttir"])
    narrow = re.findall(NARROW_PRODUCTS, assembly["ttir"])
    offsets = [bits for _, bits in places]
    # Triton asks for its shared memory when it launches: the file of the kernel does not know of it.
    resources["shared"] += assembly["launch_shared"]
    return resources | instructions | {"places": places, "offsets": offsets, "narrow_products": narrow}


def build(modules: Sequence[ModuleType], launch: Callable[[], object], **options: int) -> Builds:
    """Every kernel of ``modules`` that ``launch`` launches, on the current target."""
    kernels = [(module, name) for module in modules for name in vars(module) if name.endswith("_kernel")]
    replaced = [getattr(module, name) for module, name in kernels]
    compiling = [Compiling(kernel, **options) for kernel in replaced]
    try:
        for (module, name), one in zip(kernels, compiling, strict=True):
            setattr(module, name, one)
        launch()
    finally:
        for (module, name), kernel in zip(kernels, replaced, strict=True):
            setattr(module, name, kernel)
    return [
        {"kernel": name, **examine(assembly)}
        for (_, name), one in zip(kernels, compiling, strict=True)
        for assembly in one.built
    ]


def write_builds(
    target: str,
    modules: Sequence[ModuleType],
    cases: Mapping[str, Callable[[], object]],
    starved: tuple[str, int] | None = None,
) -> None:
    """What every case launches, for every capability, as JSON in the file ``target``: a list of objects with
    capability, case, kernel and what `examine` says.

    ``starved``, a case and a number of registers that is too small for it, is built for the last capability as the
    case "starved", so that there are spills to be found.
    """
    driver = Offline()
    triton.runtime.driver.set_active(driver)
    results = []
    for driver.capability in CAPABILITIES:
        for case, launch in cases.items():
            results += [{"capability": driver.capability, "case": case, **one} for one in build(modules, launch)]
    if starved is not None:
        found = build(modules, cases[starved[0]], maxnreg=starved[1])
        results += [{"capability": driver.capability, "case": "starved", **one} for one in found]
    Path(target).write_text(json.dumps(results, indent=1), "utf-8")
