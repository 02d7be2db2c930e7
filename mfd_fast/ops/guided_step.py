"""What follows an evaluation of the field in a scheduled rollout: guidance, the solver's sums and the next input.

Everything is updated in place, so that it can be recorded in a CUDA graph together with the network.
`guided_step_reference` is the definition; on an NVIDIA GPU one Triton kernel does all of it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast.guidance import combine
from mfd_fast.ops import launchers
from mfd_fast.path import expand_times

TIME, ACTIVE, STORE, NUMBERS = 0, 1, 2, 3
"""Rows of the coefficients; `NUMBERS` is the first of 2 (1 + R): those of the increment, then those of the offset."""


class SlotState(NamedTuple):
    """S slots, each with one row under way. float32 or float64 but for the input; contiguous."""

    start: Tensor
    """``[S, ...]``: the state at the start of the row's interval."""
    displacement: Tensor
    """``[S, ...]``: what has been added to it; updated."""
    memory: Tensor
    """``[R, S, ...]``: velocities that are needed again; updated."""
    inputs: Tensor
    """``[S, ...]``: where the field is evaluated next, in its own dtype; updated."""
    coefficients: Tensor
    """``[3 + 2 (1 + R), S]``: time, whether the slot is active, which memory keeps the velocity, and the numbers."""


def guided_step(state: SlotState, conditional: Tensor, negative: Tensor | None, guidance: Tensor | None) -> None:
    """Update the first n slots of ``state`` with the velocities that the field gave at their inputs.

    Args:
        state: the slots.
        conditional: ``[n, ...]`` in any floating-point dtype: the velocity, or the conditional one under guidance.
        negative: ``[n, ...]``, the velocity that guidance pushes away from, or None.
        guidance: ``[n]`` or expanded to it, in the dtype of the state; None without ``negative``.

    See `guided_step_reference` for the formulas. Raises ValueError if sizes or dtypes disagree.
    """
    _check(state, conditional, negative, guidance)
    fast = _FAST.get(conditional.device.type)
    if fast is None or not fast(state, conditional, negative, guidance):
        guided_step_reference(state, conditional, negative, guidance)


def guided_step_reference(
    state: SlotState, conditional: Tensor, negative: Tensor | None, guidance: Tensor | None
) -> None:
    """The definition of `guided_step`, in torch.

    With ``v = negative + guidance (conditional - negative)``, or the conditional velocity alone, and the memories m::

        displacement += increment_0 v + sum_j increment_(1+j) m_j
        inputs = start + (displacement + offset_0 v + sum_j offset_(1+j) m_j)
        m_store = v

    Terms with a coefficient of zero are left out, so that what they would multiply may be anything. Slots that are not
    active stay as they are.
    """
    rows = conditional.shape[0]
    velocity = conditional.to(state.start.dtype)
    if negative is not None:
        assert guidance is not None
        velocity = combine(conditional, negative, guidance)
    numbers = state.coefficients[:, :rows]
    terms = [velocity, *state.memory[:, :rows]]
    on = expand_times(numbers[ACTIVE] != 0, velocity)
    displacement = state.displacement[:rows] + _sum(numbers[NUMBERS:], terms)
    following = state.start[:rows] + (displacement + _sum(numbers[NUMBERS + len(terms) :], terms))
    for place in range(len(terms) - 1):
        kept = on & expand_times(numbers[STORE] == place, velocity)
        state.memory[place, :rows] = torch.where(kept, velocity, state.memory[place, :rows])
    state.displacement[:rows] = torch.where(on, displacement, state.displacement[:rows])
    state.inputs[:rows] = torch.where(on, following.to(state.inputs.dtype), state.inputs[:rows])


def _sum(numbers: Tensor, terms: list[Tensor]) -> Tensor:
    total = torch.zeros_like(terms[0])
    for number, term in zip(numbers, terms, strict=False):
        factor = expand_times(number, term)
        total = total + torch.where(factor != 0, factor * term, 0.0)
    return total


def _run_triton(state: SlotState, conditional: Tensor, negative: Tensor | None, guidance: Tensor | None) -> bool:
    kernels = launchers.load("guided_step", conditional.device)
    if kernels is None:
        return False
    negative = None if negative is None else negative.contiguous()
    kernels.launch_guided_step(*state, conditional.contiguous(), negative, guidance)
    return True


_FAST = {"cuda": _run_triton}
"""By type of device: what does the step there; False from it means that it cannot."""


def _check(state: SlotState, conditional: Tensor, negative: Tensor | None, guidance: Tensor | None) -> None:
    rows, sample = conditional.shape[0], conditional.shape[1:]
    slots = state.start.shape[0]
    shapes = [tuple(part.shape[-1 - len(sample) :]) for part in (state.start, state.displacement, state.inputs)]
    if rows > slots or any(shape != (slots, *sample) for shape in shapes):
        raise ValueError(f"state must have {rows} slots or more of shape {tuple(sample)}, got {shapes}")
    memories = state.memory.shape[0]
    if state.memory.shape[1:] != state.start.shape or state.coefficients.shape != (3 + 2 * (1 + memories), slots):
        raise ValueError(
            f"memory must be [R, S, ...] and coefficients [3 + 2 (1 + R), S], got {tuple(state.memory.shape)} and "
            f"{tuple(state.coefficients.shape)}"
        )
    dtypes = {state.start.dtype, state.displacement.dtype, state.memory.dtype, state.coefficients.dtype}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        raise ValueError(f"start, displacement, memory and coefficients must be float32 or float64, got {dtypes}")
    if not all(part.is_contiguous() for part in state):
        raise ValueError("state must be contiguous")
    if (negative is None) != (guidance is None):
        raise ValueError("negative and guidance must be given together")
    if negative is not None and guidance is not None:
        if negative.shape != conditional.shape or negative.dtype != conditional.dtype:
            raise ValueError(f"negative must be like conditional {tuple(conditional.shape)}, got {negative.shape}")
        if guidance.shape != (rows,) or guidance.dtype != state.start.dtype:
            raise ValueError(f"guidance must be [{rows}] in {state.start.dtype}, got {guidance.shape} {guidance.dtype}")
