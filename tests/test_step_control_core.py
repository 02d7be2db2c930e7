"""The compiled adaptive step control, and CUDA, against the definition on the CPU."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mfd_fast import native
from mfd_fast.ops.step_control import ControlState, advance_reference
from mfd_fast.step_control import AdaptiveSteps
from mfd_fast.types import Status


def random_proposal(seed: int, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows in every situation: (t, step, previous_error, status), r, x, candidate, error."""
    generator = np.random.default_rng(seed)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values)).to(dtype)

    t, r = tensor(generator.random(rows)), tensor(generator.random(rows))
    share = generator.choice([1e-9, 0.01, 0.3, 0.9999999, 1.0], rows)
    step = torch.where(tensor(share) == 1, r - t, tensor(share) * (r - t))
    previous_error = tensor(10.0 ** generator.uniform(-4, 0, rows))
    status = torch.from_numpy(
        generator.choice([int(Status.RUNNING)] * 6 + [int(Status.SUCCESS), int(Status.NON_FINITE)], rows)
    )
    x, candidate = (tensor(generator.normal(size=(rows, *shape))) for _ in range(2))
    magnitude = 10.0 ** generator.choice([-30, -6, -3, -2, -1, 2, 6], size=(rows, *(1 for _ in shape)))
    error = tensor(generator.normal(size=(rows, *shape)) * magnitude)
    spoilt = generator.random(rows)
    for limit, target, value in ((0.05, x, math.nan), (0.1, candidate, math.inf), (0.15, error, math.nan)):
        target.view(rows, math.prod(shape))[torch.from_numpy((spoilt < limit) & (spoilt >= limit - 0.05)), -1:] = value
    return t, step, previous_error, status, r, x, candidate, error


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.sampled_from([0, 1, 2, 7, 33]),
    shape=st.sampled_from([(1,), (2,), (5,), (3, 7), (1, 8, 8), (), (2049,)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    max_step=st.sampled_from([None, 0.02, 0.5]),
    max_factor=st.sampled_from([5.0, 1e6]),
    order=st.integers(1, 5),
)
def test_core_matches_reference(
    seed: int,
    rows: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    max_step: float | None,
    max_factor: float,
    order: int,
) -> None:
    assert native.core() is not None
    t, step, previous_error, status, r, x, candidate, error = random_proposal(seed, rows, shape, dtype)
    control = AdaptiveSteps(max_step=max_step, max_factor=max_factor)
    state = ControlState(t, step, previous_error, status, torch.zeros(rows, dtype=torch.bool))
    compiled = control.advance(state, r, x, candidate, error, order)
    reference = advance_reference(control, state, r, x, candidate, error, order)

    scale = 0.01 + 0.01 * torch.maximum(x.double().abs(), candidate.double().abs())
    e = (error.double() / scale).flatten(1).square().mean(1).sqrt() if shape else (error.double() / scale).abs()
    clear = ((e - 1).abs() > 1e-5) | e.isnan()
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    for name, ours, expected in zip(ControlState._fields, compiled, reference, strict=True):
        assert ours.dtype == expected.dtype, name
        assert ours.shape == (rows,), name
        if name in ("status", "accepted"):
            assert ours[clear].tolist() == expected[clear].tolist(), name
        else:
            torch.testing.assert_close(ours[clear], expected[clear], rtol=rtol, atol=0.0, msg=name)


def test_large_batch_with_threads_matches_one_thread() -> None:
    t, step, previous_error, status, r, x, candidate, error = random_proposal(3, 97, (1024,), torch.float32)
    control = AdaptiveSteps()
    state = ControlState(t, step, previous_error, status, torch.zeros(97, dtype=torch.bool))
    threads = torch.get_num_threads()
    results = []
    for number in (1, 3):
        torch.set_num_threads(number)
        try:
            results.append(control.advance(state, r, x, candidate, error, 3))
        finally:
            torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_control_does_not_synchronise_on_cuda() -> None:
    t, step, previous_error, status, r, x, candidate, error = random_proposal(5, 33, (64,), torch.float32)
    control = AdaptiveSteps(max_step=0.1)
    state = ControlState(t, step, previous_error, status, torch.zeros(33, dtype=torch.bool))
    expected = advance_reference(control, state, r, x, candidate, error, 3)
    on_device = ControlState(*(value.cuda() for value in state))
    tensors = [value.cuda() for value in (r, x, candidate, error)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        after = control.advance(on_device, *tensors, 3)
        control.start(on_device.t, tensors[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, cpu in zip(after, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-5, atol=0.0)
