"""Rollouts of MLP fields in one launch: every program takes a block of rows through all steps and all layers.

The operations are those of mfd_fast/ops/mlp_program.py, the rollout that of `rollout_reference` in
mfd_fast/ops/mlp_rollout.py. Networks come as tables of integers, so that one build of the kernel serves all of them.
The features of a block lie in its scratch memory, which stays in the caches; weights are read from where they are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 16
BLOCK_OUT = 32
BLOCK_IN = 16
BLOCK_COLUMNS = 32
NUM_WARPS = 4
NUM_STAGES = 1

HEADER = 20
"""Integers that describe a rollout: first program, samples, features, groups, place and number of operations, place of
the inputs, inputs a group, place of the rows, is it of two steps, where the output and the velocity before lie in
scratch memory, addresses of x, t, r, guidance scale (0: none) and its stride, displacement, mean velocity; one is
unused."""
OPERATION = 11
"""Integers of an operation: code, then start and width of destination, source and other slot, a, b, two addresses."""

_LAYER_NORM_EPSILON = tl.constexpr(1e-5)


@triton.jit
def _floats(address: tl.tensor) -> tl.tensor:
    """The pointer to float32 numbers at an address."""
    return address.to(tl.pointer_type(tl.float32))


@triton.jit
def _small(place: tl.tensor) -> tl.tensor:
    """A width or a start in scratch memory: 32 bits leave the registers to the features."""
    return tl.load(place).to(tl.int32)


@triton.jit
def _sine(x: tl.tensor) -> tl.tensor:
    """sin x for |x| < 1e4, absolute error 1e-7: the general one keeps a table in local memory for huge arguments."""
    half_turns = tl.floor(x * 0.3183098861837907 + 0.5)
    # pi in three parts, of which half_turns times the first two is exact.
    rest = x - half_turns * 3.140625
    rest = rest - half_turns * 9.67502593994140625e-4
    rest = rest - half_turns * 1.509957990978376e-7
    square = rest * rest
    total = 2.7557319223985893e-6 + square * (-2.505210838544172e-8 + square * 1.6059043836821613e-10)
    total = 8.333333333333333e-3 + square * (-1.984126984126984e-4 + square * total)
    value = rest + rest * square * (-0.16666666666666666 + square * total)
    return tl.where((half_turns.to(tl.int32) & 1) == 1, -value, value)


@triton.jit
def _activate(x: tl.tensor, kind: tl.tensor) -> tl.tensor:
    """The activation of this number."""
    if kind == 1:
        x = x / (1.0 + tl.exp(-x))
    elif kind == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif kind == 3:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * inner))
    elif kind == 4:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif kind == 5:
        # 1 - 2 / (e^2|x| + 1) loses what is small; below 0.1 the series is exact to rounding.
        size = tl.abs(x)
        far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
        square = x * x
        near = x * (1.0 - square * (0.3333333333333333 - square * (0.13333333333333333 - square * 0.05396825396825397)))
        x = tl.where(size < 0.1, near, tl.where(x < 0, -far, far))
    return x


@triton.jit
def _linear(
    src_ptr: tl.tensor,
    width_in: tl.tensor,
    dst_ptr: tl.tensor,
    width_out: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
) -> None:
    """``dst = src @ weight.T + bias`` with the weight as torch has it, ``[out, in]``."""
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    weight_ptr = _floats(weight)
    for first_out in range(0, width_out, BLOCK_OUT):
        outs = first_out + tl.arange(0, BLOCK_OUT)[None, :]
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for first_in in range(0, width_in, BLOCK_IN):
            columns = first_in + tl.arange(0, BLOCK_IN)
            source = tl.load(src_ptr + rows * width_in + columns[None, :], mask=columns[None, :] < width_in, other=0.0)
            there = (columns[:, None] < width_in) & (outs < width_out)
            part = tl.load(weight_ptr + outs * width_in + columns[:, None], mask=there, other=0.0)
            total = tl.dot(source, part, total, input_precision="ieee")
        if bias != 0:
            total += tl.load(_floats(bias) + outs, mask=outs < width_out, other=0.0)
        tl.store(dst_ptr + rows * width_out + outs, total, mask=(outs < width_out) & (rows >= 0))


@triton.jit
def _layer_norm(
    src_ptr: tl.tensor, dst_ptr: tl.tensor, width: tl.tensor, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
) -> None:
    """Rows with mean 0 and variance 1."""
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    columns = tl.arange(0, BLOCK_COLUMNS)[None, :]
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first in range(0, width, BLOCK_COLUMNS):
        mask = (first + columns < width) & (rows >= 0)
        total += tl.sum(tl.load(src_ptr + rows * width + first + columns, mask=mask, other=0.0), 1)
    mean = (total / width)[:, None]
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first in range(0, width, BLOCK_COLUMNS):
        mask = (first + columns < width) & (rows >= 0)
        value = tl.load(src_ptr + rows * width + first + columns, mask=mask, other=0.0)
        centred = tl.where(mask, value - mean, 0.0)
        total += tl.sum(centred * centred, 1)
    scale = 1.0 / tl.sqrt(total / width + _LAYER_NORM_EPSILON)[:, None]
    for first in range(0, width, BLOCK_COLUMNS):
        mask = (first + columns < width) & (rows >= 0)
        value = tl.load(src_ptr + rows * width + first + columns, mask=mask, other=0.0)
        tl.store(dst_ptr + rows * width + first + columns, (value - mean) * scale, mask=mask)


@triton.jit
def _input(
    op_ptr: tl.tensor,
    input_ptr: tl.tensor,
    group_stride: tl.tensor,
    dst_ptr: tl.tensor,
    width: tl.tensor,
    samples: tl.tensor,
    groups: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Rows of a condition, or rows of a table that the condition names; NaN where the table has no such row."""
    which, table_rows, table = tl.load(op_ptr + 7), tl.load(op_ptr + 8), tl.load(op_ptr + 9)
    group = tl.arange(0, BLOCK_ROWS) // (BLOCK_ROWS // groups)
    entry = input_ptr + group * group_stride + 2 * which
    address, stride = tl.load(entry), tl.load(entry + 1)
    columns = tl.arange(0, BLOCK_COLUMNS)[None, :]
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    if tl.load(op_ptr) == 4:
        source = (_floats(address) + samples * stride)[:, None]
        known = (samples >= 0)[:, None]
    else:
        index = tl.load(address.to(tl.pointer_type(tl.int64)) + samples * stride)
        known = ((index >= 0) & (index < table_rows))[:, None]
        source = (_floats(table) + index * width)[:, None]
    for first in range(0, width, BLOCK_COLUMNS):
        inside = (first + columns < width) & (rows >= 0)
        value = tl.load(source + first + columns, mask=inside & known, other=float("nan"))
        tl.store(dst_ptr + rows * width + first + columns, value, mask=inside)


@triton.jit
def _elementwise(
    op_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Activation, Fourier features, modulation, sums and copies."""
    code = tl.load(op_ptr)
    dst_ptr, width = scratch_ptr + _small(op_ptr + 1), _small(op_ptr + 2)
    src_ptr, src_width = scratch_ptr + _small(op_ptr + 3), _small(op_ptr + 4)
    other_ptr, other_width = scratch_ptr + _small(op_ptr + 5), _small(op_ptr + 6)
    a, b = _small(op_ptr + 7), _small(op_ptr + 8)
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    count = tl.where(code == 9, src_width, width)
    for first in range(0, count, BLOCK_COLUMNS):
        columns = first + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mask = (columns < count) & (rows >= 0)
        dst = dst_ptr + rows * width + columns
        if code == 3:
            time = tl.load(src_ptr + rows)
            angular = tl.load(_floats(tl.load(op_ptr + 9)) + columns, mask=columns < count, other=0.0)
            phase = tl.load(_floats(tl.load(op_ptr + 10)) + columns, mask=columns < count, other=0.0)
            tl.store(dst, _sine(time * angular + phase), mask=mask)
        else:
            value = tl.load(src_ptr + rows * src_width + columns, mask=mask, other=0.0)
            other = other_ptr + rows * other_width + columns
            if code == 1:
                tl.store(dst, _activate(value, a), mask=mask)
            elif code == 6:
                scale, shift = tl.load(other + a, mask=mask, other=0.0), tl.load(other + b, mask=mask, other=0.0)
                tl.store(dst, value * (1.0 + scale) + shift, mask=mask)
            elif code == 7:
                tl.store(dst, value + tl.load(other, mask=mask, other=0.0), mask=mask)
            elif code == 8:
                product = value * tl.load(other, mask=mask, other=0.0)
                tl.store(dst, tl.load(dst, mask=mask, other=0.0) + product, mask=mask)
            else:
                tl.store(dst + a, value, mask=mask)


@triton.jit
def _network(
    table_ptr: tl.tensor,
    header_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    samples: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    OPERATION: tl.constexpr,
) -> None:
    """All operations of a network on what is in slots 0 and 1."""
    groups = _small(header_ptr + 3)
    op_ptr, operations = table_ptr + tl.load(header_ptr + 4), tl.load(header_ptr + 5)
    input_ptr, group_stride = table_ptr + tl.load(header_ptr + 6), 2 * tl.load(header_ptr + 7)
    for _ in range(0, operations):
        code = tl.load(op_ptr)
        dst_ptr, width = scratch_ptr + _small(op_ptr + 1), _small(op_ptr + 2)
        src_ptr, src_width = scratch_ptr + _small(op_ptr + 3), _small(op_ptr + 4)
        if code == 0:
            weight, bias = tl.load(op_ptr + 9), tl.load(op_ptr + 10)
            _linear(src_ptr, src_width, dst_ptr, width, weight, bias, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN)
        elif code == 2:
            _layer_norm(src_ptr, dst_ptr, width, BLOCK_ROWS, BLOCK_COLUMNS)
        elif (code == 4) | (code == 5):
            # fmt: off
            _input(op_ptr, input_ptr, group_stride, dst_ptr, width, samples, groups, BLOCK_ROWS, BLOCK_COLUMNS)
            # fmt: on
        else:
            _elementwise(op_ptr, scratch_ptr, BLOCK_ROWS, BLOCK_COLUMNS)
        # The next operation reads what other threads of this program have written.
        tl.debug_barrier()
        op_ptr += OPERATION


@triton.jit
def _advance(
    header_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    evaluation: tl.tensor,
    samples: tl.tensor,
    valid: tl.tensor,
    run: tl.tensor,
    h: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """The solver's part after one evaluation: guidance, displacement and the next state, in slot 0 of all groups."""
    features, groups, two_step = _small(header_ptr + 2), _small(header_ptr + 3), _small(header_ptr + 9)
    out_ptr, previous_ptr = scratch_ptr + _small(header_ptr + 10), scratch_ptr + _small(header_ptr + 11)
    x_ptr, scale_address = _floats(tl.load(header_ptr + 12)), tl.load(header_ptr + 15)
    displacement_ptr, mean_ptr = _floats(tl.load(header_ptr + 17)), _floats(tl.load(header_ptr + 18))
    count = BLOCK_ROWS // groups
    rows = tl.arange(0, BLOCK_ROWS)
    # By row, because the interpreter cannot join a mask with one truth value.
    at = tl.zeros((BLOCK_ROWS,), tl.int32) + evaluation
    two = (tl.zeros((BLOCK_ROWS,), tl.int32) + two_step) != 0
    heun_start, heun_end, multistep = two & (at == 0), two & (at == 1), two & (at > 1)
    step = tl.where(heun_end | multistep, at - 1, at)
    mine = valid & (rows < count)
    moving = (mine & (run > step))[:, None]
    commits = (mine & (run > step) & ~heun_start)[:, None]
    uses_previous = (mine & (heun_end | multistep))[:, None]
    keeps_velocity = (mine & (heun_start | multistep))[:, None]
    begins, under_way = (mine & (at == 0))[:, None], (mine & (at > 0))[:, None]
    doubled = (mine & (tl.zeros_like(rows) + groups > 1))[:, None]
    mine = mine[:, None]
    now = tl.where(heun_end, 0.5, tl.where(multistep, 1.5, 1.0))[:, None]
    before = tl.where(heun_end, 0.5, tl.where(multistep, -0.5, 0.0))[:, None]
    width = h[:, None]
    for first in range(0, features, BLOCK_COLUMNS):
        columns = first + tl.arange(0, BLOCK_COLUMNS)[None, :]
        inside = columns < features
        local = rows[:, None] * features + columns
        outside = samples[:, None] * features + columns
        velocity = tl.load(out_ptr + local, mask=mine & inside, other=0.0)
        if scale_address != 0:
            scale = tl.load(_floats(scale_address) + samples * tl.load(header_ptr + 16))[:, None]
            negative = tl.load(out_ptr + local + count * features, mask=mine & inside, other=0.0)
            velocity = negative + scale * (velocity - negative)
        previous = tl.load(previous_ptr + local, mask=uses_previous & inside, other=0.0)
        increment = width * (now * velocity + before * previous)
        tl.store(previous_ptr + local, velocity, mask=keeps_velocity & inside)
        moved = tl.load(displacement_ptr + outside, mask=under_way & inside, other=0.0)
        ahead = moved + tl.where(moving, increment, 0.0)
        moved = tl.where(commits, ahead, moved)
        tl.store(displacement_ptr + outside, moved, mask=mine & inside)
        tl.store(mean_ptr + outside, velocity, mask=begins & inside)
        x = tl.load(x_ptr + outside, mask=mine & inside, other=0.0) + ahead
        tl.store(scratch_ptr + local, x, mask=mine & inside)
        tl.store(scratch_ptr + local + count * features, x, mask=doubled & inside)


@triton.jit(do_not_specialize=["n_rollouts", "scratch_floats"])
def _mlp_rollout_fwd_kernel(
    table_ptr: tl.tensor,  # int64: headers, then what they point to
    scratch_ptr: tl.tensor,  # float32, scratch_floats for each program
    n_rollouts: tl.tensor,
    scratch_floats: tl.tensor,
    HEADER: tl.constexpr,
    OPERATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """One program integrates a block of samples of one rollout."""
    program = tl.program_id(0).to(tl.int64)
    scratch_ptr += program * scratch_floats
    header_ptr = table_ptr
    for other in range(1, n_rollouts):
        header_ptr = tl.where(tl.load(table_ptr + other * HEADER) <= program, table_ptr + other * HEADER, header_ptr)
    total, features, groups = tl.load(header_ptr + 1), _small(header_ptr + 2), _small(header_ptr + 3)
    two_step = _small(header_ptr + 9)
    rows = tl.arange(0, BLOCK_ROWS)
    position = (program - tl.load(header_ptr)) * (BLOCK_ROWS // groups) + rows % (BLOCK_ROWS // groups)
    valid = position < total
    # A row that is not there is a copy of the first, which nobody stores.
    position = tl.where(valid, position, 0)
    plan_ptr = table_ptr + tl.load(header_ptr + 8)
    samples = tl.load(plan_ptr + position)
    planned, run = tl.load(plan_ptr + total + position), tl.load(plan_ptr + 2 * total + position)
    t = tl.load(_floats(tl.load(header_ptr + 13)) + samples)
    r = tl.load(_floats(tl.load(header_ptr + 14)) + samples)
    h = tl.div_rn(r - t, tl.maximum(planned, 1).to(tl.float32))
    x_ptr = _floats(tl.load(header_ptr + 12))
    for first in range(0, features, BLOCK_COLUMNS):
        columns = first + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mask = (columns < features) & (rows >= 0)[:, None]
        x = tl.load(x_ptr + samples[:, None] * features + columns, mask=mask, other=0.0)
        tl.store(scratch_ptr + rows[:, None] * features + columns, x, mask=mask)
    steps = tl.max(run, 0)
    evaluations = tl.where(two_step != 0, steps + 1, tl.maximum(steps, 1))
    evaluations = tl.where(steps == 0, 1, evaluations)
    for evaluation in range(0, evaluations):
        point = evaluation - tl.where((two_step != 0) & (evaluation > 1), 1, 0)
        now = t + point.to(tl.float32) * h
        now = tl.minimum(tl.maximum(now, tl.minimum(t, r)), tl.maximum(t, r))
        tl.store(scratch_ptr + BLOCK_ROWS * features + rows, now)
        tl.debug_barrier()
        # fmt: off
        _network(
            table_ptr, header_ptr, scratch_ptr, samples, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN, BLOCK_COLUMNS, OPERATION
        )
        _advance(header_ptr, scratch_ptr, evaluation, samples, valid, run, h, BLOCK_ROWS, BLOCK_COLUMNS)
        # fmt: on
        tl.debug_barrier()
    covered = tl.where(run == planned, r - t, run.to(tl.float32) * h)
    displacement_ptr, mean_ptr = _floats(tl.load(header_ptr + 17)), _floats(tl.load(header_ptr + 18))
    moved = (valid & (rows < BLOCK_ROWS // groups) & (run > 0))[:, None]
    for first in range(0, features, BLOCK_COLUMNS):
        columns = first + tl.arange(0, BLOCK_COLUMNS)[None, :]
        place = samples[:, None] * features + columns
        displacement = tl.load(displacement_ptr + place, mask=moved & (columns < features), other=0.0)
        tl.store(mean_ptr + place, tl.div_rn(displacement, covered[:, None]), mask=moved & (columns < features))


def launch_mlp_rollouts(table: Tensor, n_rollouts: int, programs: int, scratch_floats: int) -> None:
    """Integrate what ``table`` (int64, on the device; see `HEADER` and `OPERATION`) describes, into its outputs."""
    if programs == 0:
        return
    scratch = torch.empty(programs * scratch_floats, dtype=torch.float32, device=table.device)
    with torch.cuda.device_of(table):
        _mlp_rollout_fwd_kernel[(programs,)](
            *(table, scratch, n_rollouts, scratch_floats),
            HEADER=HEADER,
            OPERATION=OPERATION,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_OUT=BLOCK_OUT,
            BLOCK_IN=BLOCK_IN,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
