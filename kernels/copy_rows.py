"""Gather rows of one tensor, convert them and scatter them into rows of another, in one launch.

The definition is `copy_rows_reference` in mfd_fast/ops/copy_rows.py. One program copies one piece of one row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
ELEMENTS_PER_THREAD = 8


@triton.jit
def _copy_rows_kernel(
    source_ptr: tl.tensor,  # [N, width]
    source_rows_ptr: tl.tensor,  # [rows] int64
    target_ptr: tl.tensor,  # [M, width], written
    target_rows_ptr: tl.tensor,  # [rows] int64
    width: tl.tensor,
    pieces: tl.tensor,
    PIECE: tl.constexpr,
) -> None:
    """One program copies PIECE elements of one row."""
    program = tl.program_id(0).to(tl.int64)
    row = program // pieces
    columns = (program - row * pieces) * PIECE + tl.arange(0, PIECE)
    mask = columns < width
    values = tl.load(source_ptr + tl.load(source_rows_ptr + row) * width + columns, mask=mask)
    if source_ptr.dtype.element_ty == tl.float64 and target_ptr.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)  # as torch, which rounds to float32 first
    target = target_ptr + tl.load(target_rows_ptr + row) * width + columns
    tl.store(target, values.to(target_ptr.dtype.element_ty), mask=mask)


def launch_copy_rows(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """``target[target_rows[i]] = source[source_rows[i]]``; all contiguous on one device, the indices int64 ``[n]``."""
    rows = source_rows.shape[0]
    width = target.numel() // max(target.shape[0], 1)
    if rows == 0 or width == 0:
        return
    piece = min(triton.next_power_of_2(width), BLOCK)
    pieces = triton.cdiv(width, piece)
    with torch.cuda.device_of(target):
        _copy_rows_kernel[(rows * pieces,)](
            *(source, source_rows, target, target_rows, width, pieces),
            PIECE=piece,
            num_warps=max(1, piece // (32 * ELEMENTS_PER_THREAD)),
        )
