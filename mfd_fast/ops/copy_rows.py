"""Copy rows of one tensor into rows of another: how slots of a rollout are filled, emptied and given their conditions.

`copy_rows_reference` is the definition; on an NVIDIA GPU one Triton kernel gathers, converts and scatters.
"""

import torch
from torch import Tensor

from mfd_fast.ops import launchers

DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8),
)
"""What the kernel copies; source and target may differ among the floating-point ones."""


def copy_rows(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """``target[target_rows[i]] = source[source_rows[i]]`` in the dtype of ``target``.

    ``source`` ``[N, ...]``, ``target`` ``[M, ...]``, which share no memory; the indices ``[n]`` int64 are within them,
    those of the target without a repetition. Everything is on one device, and nothing is read back from it. Raises
    ValueError if shapes disagree.
    """
    if source.shape[1:] != target.shape[1:]:
        raise ValueError(f"target must have rows like source {tuple(source.shape)}, got {tuple(target.shape)}")
    if source_rows.shape != target_rows.shape or source_rows.dim() != 1:
        raise ValueError(f"source_rows and target_rows must be [n], got {source_rows.shape} and {target_rows.shape}")
    fast = _FAST.get(target.device.type)
    if fast is None or not fast(source, source_rows, target, target_rows):
        copy_rows_reference(source, source_rows, target, target_rows)


def copy_rows_reference(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """The definition of `copy_rows`."""
    target.index_copy_(0, target_rows, source.index_select(0, source_rows).to(target.dtype))


def _run_triton(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> bool:
    alike = source.dtype == target.dtype or (source.is_floating_point() and target.is_floating_point())
    if not (alike and source.dtype in DTYPES and target.dtype in DTYPES and target.is_contiguous()):
        return False
    kernels = launchers.load("copy_rows", target.device)
    if kernels is None:
        return False
    kernels.launch_copy_rows(source.contiguous(), source_rows.contiguous(), target, target_rows.contiguous())
    return True


_FAST = {"cuda": _run_triton}
"""By type of device: what copies there; False from it means that it cannot."""
