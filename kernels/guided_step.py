"""The guided solver step in one launch: guidance, the solver's sums, displacement, memory and the network's next input.

The formulas are those of the definition, `guided_step_reference` in mfd_fast/ops/guided_step.py. One program updates
one piece of one row; everything is read once and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
ELEMENTS_PER_THREAD = 8

# Rows of the coefficients, as in mfd_fast/ops/guided_step.py.
_ACTIVE = tl.constexpr(1)
_STORE = tl.constexpr(2)
_NUMBERS = tl.constexpr(3)


@triton.jit
def _velocity(
    conditional_ptr: tl.tensor,
    negative_ptr: tl.tensor,
    guidance_ptr: tl.tensor,
    guidance_stride: tl.tensor,
    row: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    dtype: tl.constexpr,
) -> tl.tensor:
    """The velocity of a piece of a row in the dtype of the state, guided where there is a negative one."""
    velocity = tl.load(conditional_ptr + offsets, mask=mask, other=0.0).to(dtype)
    if negative_ptr is not None:
        negative = tl.load(negative_ptr + offsets, mask=mask, other=0.0).to(dtype)
        velocity = negative + tl.load(guidance_ptr + row * guidance_stride) * (velocity - negative)
    return velocity


@triton.jit
def _term(number: tl.tensor, value: tl.tensor) -> tl.tensor:
    """``number * value``, or 0 where the number is 0, whatever the value."""
    return tl.where(number != 0.0, number * value, 0.0)


@triton.jit(do_not_specialize=["slots"])
def _guided_step_kernel(
    start_ptr: tl.tensor,  # [slots, width]
    displacement_ptr: tl.tensor,  # [slots, width], updated
    memory_ptr: tl.tensor,  # [MEMORIES, slots, width], updated
    inputs_ptr: tl.tensor,  # [slots, width], written
    coefficients_ptr: tl.tensor,  # [3 + 2 * (1 + MEMORIES), slots]
    conditional_ptr: tl.tensor,  # [rows, width]
    negative_ptr: tl.tensor,  # [rows, width], or None
    guidance_ptr: tl.tensor,  # [rows] at guidance_stride, or None
    guidance_stride: tl.tensor,
    slots: tl.tensor,
    width: tl.tensor,
    pieces: tl.tensor,
    MEMORIES: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """One program updates PIECE elements of one row."""
    program = tl.program_id(0).to(tl.int64)
    row = program // pieces
    if tl.load(coefficients_ptr + _ACTIVE * slots + row) != 0.0:
        columns = (program - row * pieces) * PIECE + tl.arange(0, PIECE)
        mask = columns < width
        offsets = row * width + columns
        dtype: tl.constexpr = start_ptr.dtype.element_ty
        # fmt: off
        velocity = _velocity(
            conditional_ptr, negative_ptr, guidance_ptr, guidance_stride, row, offsets, mask, dtype
        )
        # fmt: on
        numbers_ptr = coefficients_ptr + _NUMBERS * slots + row
        store = tl.load(coefficients_ptr + _STORE * slots + row)
        increment = _term(tl.load(numbers_ptr), velocity)
        offset = _term(tl.load(numbers_ptr + (1 + MEMORIES) * slots), velocity)
        # 64 bits: all memories together may have more elements than one of them.
        stride = width * slots.to(tl.int64)
        for j in tl.static_range(MEMORIES):
            in_increment = tl.load(numbers_ptr + (1 + j) * slots)
            in_offset = tl.load(numbers_ptr + (2 + MEMORIES + j) * slots)
            # A row reads all of a memory or none of it; the same for writing.
            needed = tl.where(in_increment != 0.0, width, tl.where(in_offset != 0.0, width, 0))
            place = memory_ptr + j * stride + offsets
            remembered = tl.load(place, mask=columns < needed, other=0.0)
            increment += _term(in_increment, remembered)
            offset += _term(in_offset, remembered)
            tl.store(place, velocity, mask=columns < tl.where(store == j, width, 0))
        displacement = tl.load(displacement_ptr + offsets, mask=mask, other=0.0) + increment
        start = tl.load(start_ptr + offsets, mask=mask, other=0.0)
        tl.store(displacement_ptr + offsets, displacement, mask=mask)
        following = start + (displacement + offset)
        if inputs_ptr.dtype.element_ty != tl.float64:  # as torch, which rounds to float32 first
            following = following.to(tl.float32)
        tl.store(inputs_ptr + offsets, following.to(inputs_ptr.dtype.element_ty), mask=mask)


def launch_guided_step(
    start: Tensor,
    displacement: Tensor,
    memory: Tensor,
    inputs: Tensor,
    coefficients: Tensor,
    conditional: Tensor,
    negative: Tensor | None,
    guidance: Tensor | None,
) -> None:
    """Update slots in place; shapes and dtypes are those of `mfd_fast.ops.guided_step`, and all of it is contiguous.

    ``guidance`` alone may be expanded. Nothing is read back from the device.
    """
    rows, slots = conditional.shape[0], start.shape[0]
    width = conditional.numel() // max(rows, 1)
    if rows == 0 or width == 0:
        return
    piece = min(triton.next_power_of_2(width), BLOCK)
    pieces = triton.cdiv(width, piece)
    with torch.cuda.device_of(conditional):
        _guided_step_kernel[(rows * pieces,)](
            *(start, displacement, memory, inputs, coefficients, conditional, negative, guidance),
            *(0 if guidance is None else guidance.stride(0), slots, width, pieces),
            MEMORIES=memory.shape[0],
            PIECE=piece,
            num_warps=max(1, piece // (32 * ELEMENTS_PER_THREAD)),
            enable_fp_fusion=False,
        )
