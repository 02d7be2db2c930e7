"""Run fused rollouts on CPU tensors in Triton's interpreter: python interpret_mlp_rollout.py OUT.npz.

A program of its own because TRITON_INTERPRET must be set before Triton is imported. OUT gets ``CASE/mean_velocity``,
``CASE/displacement``, ``CASE/counts`` and ``CASE/intact``: scratch memory and outputs are NaN until they are written,
and whether what surrounds the outputs still is.
"""

import sys
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from test_mlp_rollout import CASES
from torch import Tensor

from mfd_fast.kernels import mlp_rollout as kernels
from mfd_fast.ops import mlp_rollout as op

MARGIN = 64


def load(name: str, device: torch.device) -> ModuleType:
    assert name == "mlp_rollout"
    return kernels


def main(target: str) -> None:
    results: dict[str, np.ndarray] = {}
    empty = torch.empty
    surrounded: list[tuple[Tensor, int]] = []

    def unwritten_or_counts(*shape: int, dtype: torch.dtype, device: object = None) -> Tensor:
        fresh = empty(*shape, dtype=dtype)
        return fresh.fill_(float("nan")) if dtype.is_floating_point else fresh.fill_(99)

    def unwritten_like(like: Tensor) -> Tensor:
        buffer = empty(like.numel() + 2 * MARGIN).fill_(float("nan"))
        surrounded.append((buffer, like.numel()))
        return buffer[MARGIN : MARGIN + like.numel()].view(like.shape)

    for case, make in CASES.items():
        surrounded.clear()
        rollouts = make()
        with (
            mock.patch.object(op.launchers, "load", load),
            mock.patch.object(torch, "empty_like", unwritten_like),
            mock.patch.object(torch, "empty", unwritten_or_counts),
        ):
            outcomes = op._run_triton(rollouts)
        margins = [torch.cat([buffer[:MARGIN], buffer[MARGIN + count :]]) for buffer, count in surrounded]
        results[f"{case}/intact"] = np.array(all(bool(margin.isnan().all()) for margin in margins))
        for number, outcome in enumerate(outcomes):
            for name in ("mean_velocity", "displacement", "counts"):
                results[f"{case}/{number}/{name}"] = getattr(outcome, name).numpy()
    np.savez(target, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
