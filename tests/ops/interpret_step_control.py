"""Run `launch_step_control` on CPU tensors in Triton's interpreter: python interpret_step_control.py IN.npz OUT.npz.

A program of its own because TRITON_INTERPRET must be set before Triton is imported. IN holds ``CASE/ARGUMENT`` arrays
and ``CASE/settings`` as JSON; OUT gets ``CASE/RESULT``. Every tensor lies inside a larger one: what surrounds inputs is
NaN, and outputs are NaN until they are written; ``CASE/intact`` says whether everything around the outputs still is.
"""

import json
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mfd_fast.kernels.step_control import launch_step_control

MARGIN = 64
ARGUMENTS = ("t", "step", "previous_error", "status", "r", "x", "candidate", "error")
RESULTS = ("t", "step", "previous_error", "status", "accepted")
UNWRITTEN = {torch.int64: 99, torch.bool: True}

allocated: list[tuple[Tensor, int]] = []


def surrounded(shape: tuple[int, ...], dtype: torch.dtype, outside: float) -> tuple[Tensor, Tensor]:
    """A buffer full of ``outside`` and a tensor in the middle of it."""
    count = int(np.prod(shape))
    buffer = torch.full((count + 2 * MARGIN,), outside, dtype=dtype)
    return buffer, buffer[MARGIN : MARGIN + count].view(shape)


def unwritten(*shape: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    buffer, tensor = surrounded(shape, dtype, UNWRITTEN.get(dtype, float("nan")))
    allocated.append((buffer, tensor.numel()))
    return tensor


def is_intact(buffer: Tensor, count: int) -> bool:
    margins = torch.cat([buffer[:MARGIN], buffer[MARGIN + count :]])
    expected = UNWRITTEN.get(buffer.dtype)
    return bool(margins.isnan().all() if expected is None else (margins == expected).all())


def run(
    arrays: dict[str, np.ndarray], settings: dict[str, float], empty: Callable[..., Tensor]
) -> dict[str, np.ndarray]:
    tensors = {}
    for name in ARGUMENTS:
        given = torch.from_numpy(arrays[name])
        # A row read by mistake is a running one, so it is not without consequences.
        tensors[name] = surrounded(given.shape, given.dtype, 4 if name == "status" else float("nan"))[1].copy_(given)
    allocated.clear()
    torch.empty = empty
    torch.empty_like = lambda like, dtype=None: empty(*like.shape, dtype=dtype or like.dtype)
    results = launch_step_control(**tensors, **settings)
    intact = all(is_intact(buffer, count) for buffer, count in allocated)
    named = {name: result.numpy() for name, result in zip(RESULTS, results, strict=True)}
    return named | {"intact": np.array(intact), "buffers": np.array(len(allocated))}


def main(source: str, target: str) -> None:
    given = np.load(source, allow_pickle=False)
    results = {}
    for case in sorted({name.split("/")[0] for name in given}):
        arrays = {name: given[f"{case}/{name}"] for name in ARGUMENTS}
        settings = json.loads(str(given[f"{case}/settings"]))
        results |= {f"{case}/{name}": value for name, value in run(arrays, settings, unwritten).items()}
    np.savez(target, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
