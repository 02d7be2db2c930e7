"""Run `guided_step` and `copy_rows` kernels on CPU tensors in Triton's interpreter: python THIS IN.npz OUT.npz.

A program of its own because TRITON_INTERPRET must be set before Triton is imported. IN holds ``CASE/ARGUMENT`` arrays;
bfloat16 travels as float32 with its name in ``CASE/dtypes``. Every tensor lies inside a larger one that is NaN (or a
number that no test uses) around it. OUT gets ``CASE/RESULT`` and ``CASE/intact``: whether all of that is still there.
"""

import json
import sys

import numpy as np
import torch
from torch import Tensor

from mfd_fast.kernels.copy_rows import launch_copy_rows
from mfd_fast.kernels.guided_step import launch_guided_step

MARGIN = 64
STATE = ("start", "displacement", "memory", "inputs", "coefficients")
VELOCITIES = ("conditional", "negative", "guidance")
COPY = ("source", "source_rows", "target", "target_rows")


def surrounded(given: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer of what must never be used, and a copy of ``given`` in the middle of it."""
    outside = float("nan") if given.is_floating_point() else 99
    buffer = torch.full((given.numel() + 2 * MARGIN,), outside, dtype=given.dtype)
    return buffer, buffer[MARGIN : MARGIN + given.numel()].view(given.shape).copy_(given)


def is_intact(buffer: Tensor) -> bool:
    margins = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
    return bool((margins.isnan() if buffer.is_floating_point() else margins == 99).all())


def run(arrays: dict[str, np.ndarray], dtypes: dict[str, str]) -> dict[str, np.ndarray]:
    buffers, tensors = {}, {}
    for name, array in arrays.items():
        given = torch.from_numpy(array).to(getattr(torch, dtypes[name]))
        if name == "guidance" and len(given) == 1:  # one scale for all rows
            tensors[name] = given.expand(len(arrays["conditional"]))
        else:
            buffers[name], tensors[name] = surrounded(given)
    if "source" in tensors:
        launch_copy_rows(*(tensors[name] for name in COPY))
        written = ("target",)
    else:
        launch_guided_step(*(tensors[name] for name in STATE), *(tensors.get(name) for name in VELOCITIES))
        written = STATE
    results = {
        name: tensors[name].float().numpy() if tensors[name].dtype == torch.bfloat16 else tensors[name].numpy()
        for name in written
    }
    return results | {"intact": np.array(all(is_intact(buffer) for buffer in buffers.values()))}


def main(source: str, target: str) -> None:
    given = np.load(source, allow_pickle=False)
    results = {}
    for case in sorted({name.split("/")[0] for name in given}):
        dtypes = json.loads(str(given[f"{case}/dtypes"]))
        arrays = {name: given[f"{case}/{name}"] for name in dtypes}
        results |= {f"{case}/{name}": value for name, value in run(arrays, dtypes).items()}
    np.savez(target, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
