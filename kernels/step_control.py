"""Adaptive step control on the device: the error norm of every row and the PI controller in one or two launches.

The formulas are those of the definition, `advance_reference` in mfd_fast/ops/step_control.py. Rows of up to
`LONGEST_WHOLE_ROW` elements take one launch. Longer rows take two: first sums over pieces of rows, one program each,
then the control. No atomics, so equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST_WHOLE_ROW = 64
LONGEST_PIECE = 2048
PARTIALS_AT_ONCE = 16
ELEMENTS_PER_THREAD = 8

# The values of mfd_fast.types.Status.
_SUCCESS = tl.constexpr(0)
_STEP_SIZE_UNDERFLOW = tl.constexpr(2)
_NON_FINITE = tl.constexpr(3)
_RUNNING = tl.constexpr(4)

# Squares of float32 numbers above this limit are summed apart, scaled down, so that none overflows.
_LARGE = tl.constexpr(2.0**40)
_SCALED_DOWN = tl.constexpr(2.0**-80)
_SCALED_UP = tl.constexpr(2.0**160)


@triton.jit
def _sum_of_squares(
    x_ptr: tl.tensor,
    candidate_ptr: tl.tensor,
    error_ptr: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    rtol: tl.float64,
    atol: tl.float64,
    axis: tl.constexpr,
) -> tl.tensor:
    """Float64 sums over ``axis`` of ``(error / (atol + rtol * max(|x|, |candidate|)))^2``."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    candidate = tl.load(candidate_ptr + offsets, mask=mask, other=0.0)
    error = tl.load(error_ptr + offsets, mask=mask, other=0.0)
    larger = tl.maximum(tl.abs(x), tl.abs(candidate), propagate_nan=tl.PropagateNan.ALL)
    scale = tl.full((), atol, x.dtype) + tl.full((), rtol, x.dtype) * larger
    # 0 * candidate: an infinite candidate would make the scale infinite and hide itself.
    numerator = error + 0.0 * candidate
    if x.dtype == tl.float64:
        ratio = tl.where(mask, numerator / scale, 0.0)
        total = tl.sum(ratio * ratio, axis)
    else:
        ratio = tl.where(mask, tl.div_rn(numerator, scale), 0.0)
        large = tl.abs(ratio) > _LARGE
        down = ratio * _SCALED_DOWN
        small_sum = tl.sum(tl.where(large, 0.0, ratio * ratio), axis)
        large_sum = tl.sum(tl.where(large, down * down, 0.0), axis)
        total = small_sum.to(tl.float64) + large_sum.to(tl.float64) * _SCALED_UP
    return total


@triton.jit(do_not_specialize=["n_rows"])
def _step_control_partial_kernel(
    x_ptr: tl.tensor,  # [n_rows, width], as candidate and error
    candidate_ptr: tl.tensor,
    error_ptr: tl.tensor,
    partial_ptr: tl.tensor,  # [n_pieces, n_rows] float64, written
    n_rows: tl.tensor,
    width: tl.tensor,
    rtol: tl.float64,
    atol: tl.float64,
    PIECE: tl.constexpr,
) -> None:
    """One program sums the squares of one piece of a row."""
    program = tl.program_id(0).to(tl.int64)
    piece = program // n_rows
    row = program - piece * n_rows
    columns = piece * PIECE + tl.arange(0, PIECE)
    mask = columns < width
    total = _sum_of_squares(x_ptr, candidate_ptr, error_ptr, row * width + columns, mask, rtol, atol, 0)
    tl.store(partial_ptr + program, total)


@triton.jit
def _scaled_error(
    x_ptr: tl.tensor,
    candidate_ptr: tl.tensor,
    error_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    rows: tl.tensor,
    row_mask: tl.tensor,
    n_rows: tl.tensor,
    width: tl.tensor,
    n_pieces: tl.tensor,
    rtol: tl.float64,
    atol: tl.float64,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Root mean square of every row as float64, from the sums over pieces where there are some."""
    columns = tl.arange(0, BLOCK_COLUMNS)
    if partial_ptr is None:
        mask = row_mask[:, None] & (columns < width)[None, :]
        offsets = rows[:, None] * width + columns[None, :]
        total = _sum_of_squares(x_ptr, candidate_ptr, error_ptr, offsets, mask, rtol, atol, 1)
    else:
        total = tl.zeros((BLOCK_ROWS,), tl.float64)
        for first in range(0, n_pieces, BLOCK_COLUMNS):
            pieces = first + columns
            mask = (pieces < n_pieces)[:, None] & row_mask[None, :]
            offsets = pieces.to(tl.int64)[:, None] * n_rows + rows[None, :]
            total += tl.sum(tl.load(partial_ptr + offsets, mask=mask, other=0.0), 0)
    return tl.sqrt(total / tl.full((), width, tl.float64))


@triton.jit
def _next_size(
    e: tl.tensor,
    accepted: tl.tensor,
    step: tl.tensor,
    previous_error: tl.tensor,
    max_step: tl.float64,
    safety: tl.float64,
    min_factor: tl.float64,
    max_factor: tl.float64,
    ERROR_ORDER: tl.constexpr,
) -> tl.tensor:
    """Float64 size of the next step; powers are taken through base-2 logarithms."""
    log_e = tl.log2(tl.where(e > 1e-10, e, 1e-10))
    log_previous = tl.log2(previous_error.to(tl.float64))
    grow = (0.4 * log_previous - 0.7 * log_e) / ERROR_ORDER
    shrink = -log_e / ERROR_ORDER
    factor = tl.full((), safety, tl.float64) * tl.exp2(tl.where(accepted, grow, shrink))
    factor = tl.maximum(factor, tl.full((), min_factor, tl.float64))
    factor = tl.minimum(factor, tl.where(accepted, tl.full((), max_factor, tl.float64), 1.0))
    return tl.minimum(tl.abs(step.to(tl.float64)) * factor, tl.full((), max_step, tl.float64))


@triton.jit
def _next_status(t: tl.tensor, step: tl.tensor, r: tl.tensor, finite: tl.tensor) -> tl.tensor:
    """What a row that was running is after the decision."""
    status = tl.where(t + step == t, _STEP_SIZE_UNDERFLOW, _RUNNING)
    status = tl.where(t == r, _SUCCESS, status)
    return tl.where(finite, status, _NON_FINITE).to(tl.int64)


@triton.jit(do_not_specialize=["n_rows", "n_pieces"])
def _step_control_fwd_kernel(
    x_ptr: tl.tensor,  # [n_rows, width], as candidate and error; not read where partial is given
    candidate_ptr: tl.tensor,
    error_ptr: tl.tensor,
    partial_ptr: tl.tensor,  # [n_pieces, n_rows] float64, or None
    t_ptr: tl.tensor,  # [n_rows], as all that follow
    step_ptr: tl.tensor,
    previous_error_ptr: tl.tensor,
    status_ptr: tl.tensor,  # int64
    r_ptr: tl.tensor,
    next_t_ptr: tl.tensor,  # written, as all that follow
    next_step_ptr: tl.tensor,
    next_previous_error_ptr: tl.tensor,
    next_status_ptr: tl.tensor,
    accepted_ptr: tl.tensor,  # bool
    n_rows: tl.tensor,
    width: tl.tensor,
    n_pieces: tl.tensor,
    rtol: tl.float64,
    atol: tl.float64,
    max_step: tl.float64,
    safety: tl.float64,
    min_factor: tl.float64,
    max_factor: tl.float64,
    ERROR_ORDER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """One program decides on BLOCK_ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < n_rows
    # fmt: off
    e = _scaled_error(
        x_ptr, candidate_ptr, error_ptr, partial_ptr, rows, row_mask, n_rows, width, n_pieces, rtol, atol,
        BLOCK_ROWS, BLOCK_COLUMNS,
    )
    # fmt: on
    t = tl.load(t_ptr + rows, mask=row_mask, other=0.0)
    step = tl.load(step_ptr + rows, mask=row_mask, other=0.0)
    previous_error = tl.load(previous_error_ptr + rows, mask=row_mask, other=1.0)
    status = tl.load(status_ptr + rows, mask=row_mask, other=_SUCCESS)
    r = tl.load(r_ptr + rows, mask=row_mask, other=0.0)
    running = status == _RUNNING
    finite = e < float("inf")
    accepted = running & (e <= 1)

    next_t = tl.where(accepted, tl.where(step == r - t, r, t + step), t)
    size = _next_size(e, accepted, step, previous_error, max_step, safety, min_factor, max_factor, ERROR_ORDER)
    gap = r - next_t
    reached = size >= tl.abs(gap.to(tl.float64)) * (1 - 1e-6)
    next_step = tl.where(reached, gap, tl.where(gap > 0, size, -size).to(t.dtype))
    next_status = _next_status(next_t, next_step, r, finite)
    floored = tl.where(e > 1e-4, e, 1e-4).to(t.dtype)

    tl.store(next_t_ptr + rows, next_t, mask=row_mask)
    tl.store(next_step_ptr + rows, tl.where(running & finite, next_step, step), mask=row_mask)
    tl.store(next_previous_error_ptr + rows, tl.where(accepted, floored, previous_error), mask=row_mask)
    tl.store(next_status_ptr + rows, tl.where(running, next_status, status), mask=row_mask)
    tl.store(accepted_ptr + rows, accepted, mask=row_mask)


def _launch_partial(x: Tensor, candidate: Tensor, error: Tensor, width: int, rtol: float, atol: float) -> Tensor:
    """Sums of squares over pieces of rows, ``[n_pieces, n_rows]`` float64."""
    piece = min(triton.next_power_of_2(width), LONGEST_PIECE)
    n_rows, n_pieces = x.shape[0], triton.cdiv(width, piece)
    partial = torch.empty(n_pieces, n_rows, dtype=torch.float64, device=x.device)
    _step_control_partial_kernel[(n_rows * n_pieces,)](
        *(x, candidate, error, partial, n_rows, width, rtol, atol),
        PIECE=piece,
        num_warps=max(1, piece // (32 * ELEMENTS_PER_THREAD)),
        enable_fp_fusion=False,
    )
    return partial


def launch_step_control(
    t: Tensor,
    step: Tensor,
    previous_error: Tensor,
    status: Tensor,
    r: Tensor,
    x: Tensor,
    candidate: Tensor,
    error: Tensor,
    *,
    error_order: int,
    rtol: float,
    atol: float,
    max_step: float,
    safety: float,
    min_factor: float,
    max_factor: float,
) -> tuple[Tensor, ...]:
    """Decide on a proposed step of every row; returns (t, step, previous_error, status, accepted), all ``[n]``.

    ``t``, ``step``, ``previous_error``, ``r`` ``[n]`` and ``x``, ``candidate``, ``error`` ``[n, ...]`` are float32 or
    float64, ``status`` ``[n]`` int64; all of it contiguous on one device. Nothing is read back from the device.
    """
    n_rows, width = t.numel(), x.numel() // max(t.numel(), 1)
    outputs = (
        *(torch.empty_like(part) for part in (t, step, previous_error, status)),
        torch.empty_like(t, dtype=torch.bool),
    )
    if n_rows == 0:
        return outputs
    with torch.cuda.device_of(t):
        partial = None if width <= LONGEST_WHOLE_ROW else _launch_partial(x, candidate, error, width, rtol, atol)
        columns = triton.next_power_of_2(max(width, 1)) if partial is None else PARTIALS_AT_ONCE
        # One warp decides on as many rows as it has lanes, or as few as its registers leave room for.
        block_rows = min(32, 512 // columns)
        _step_control_fwd_kernel[(triton.cdiv(n_rows, block_rows),)](
            *(x, candidate, error, partial, t, step, previous_error, status, r, *outputs),
            *(n_rows, width, 0 if partial is None else partial.shape[0]),
            *(rtol, atol, max_step, safety, min_factor, max_factor),
            ERROR_ORDER=error_order,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=columns,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return outputs
