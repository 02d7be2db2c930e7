"""CPU time, and under which conditions it was taken."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mfd_fast.ops.linear import linear_reference, onednn_linear

PACKAGES = ("torch", "torchdiffeq", "torchode", "diffrax", "jax", "numpy")


def cpu_seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Least CPU time of one call, over all threads of this process: other programs on the machine count little."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


def conditions() -> dict[str, Any]:
    """Processor, load and versions; no names of machines."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "clock": "CPU time of the process (time.process_time)",
        "python": platform.python_version(),
        "versions": versions,
    }


def processor() -> str:
    """The processor's own name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gemm_gain(size: int = 1024, repeats: int = 7) -> dict[str, float]:
    """GFLOP/s of one thread at a product of two ``size`` x ``size`` matrices, and how many times faster oneDNN is."""
    x, weight = torch.randn(size, size), torch.randn(size, size)
    low, low_weight = x.bfloat16(), weight.bfloat16()
    ways = {
        "mkl_float32": lambda: linear_reference(x, weight, None),
        "onednn_float32": lambda: onednn_linear(x, weight, None),
        "bfloat16": lambda: linear_reference(low, low_weight, None),
    }
    with torch.no_grad():
        for call in ways.values():
            call()
        rounds = [{name: cpu_seconds(call) for name, call in ways.items()} for _ in range(repeats)]
    rates = {name: 2e-9 * size**3 / statistics.median(took[name] for took in rounds) for name in ways}
    return {**rates, "onednn_over_mkl": rates["onednn_float32"] / rates["mkl_float32"]}
