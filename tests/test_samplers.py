"""Few-step samplers against the schedulers of diffusers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast.samplers import SAMPLERS
from mfd_fast.student import Student

NOISE = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def field(x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
    """Curved in x and t."""
    return torch.sin(3 * x) + x.roll(1, 1) * torch.cos(7 * t[:, None])


def scheduler_of(sampler: str, steps: int, shift: float) -> Any:
    diffusers = pytest.importorskip("diffusers")
    if sampler == "euler":
        made = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        made.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
        return made
    made = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", flow_shift=shift, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    made.set_timesteps(steps)
    return made


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equals_the_scheduler(sampler: str, steps: int, shift: float) -> None:
    scheduler = scheduler_of(sampler, steps, shift)
    x = NOISE
    for now in scheduler.timesteps:
        x = scheduler.step(field(x, now.expand(4) / 1000), now, x, return_dict=False)[0]
    student = Student(field, (3,), steps, shift, sampler=sampler)
    torch.testing.assert_close(student.generate(NOISE, {}), x, rtol=1e-4, atol=1e-5)
    assert student.time_grid() == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_the_samplers_differ_where_steps_are_few() -> None:
    samples = [Student(field, (3,), 4, 3.0, sampler=name).generate(NOISE, {}) for name in SAMPLERS]
    assert (samples[0] - samples[1]).abs().max() > 0.05


def test_unknown_samplers_are_named() -> None:
    with pytest.raises(ValueError, match=r"sampler must be one of euler, dpm\+\+, got 'ddim'"):
        Student(field, (3,), sampler="ddim")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_checkpointed_steps_have_the_same_gradients(sampler: str) -> None:
    weight = torch.tensor(0.7, requires_grad=True)
    gradients, saved = [], []
    for checkpoint in (False, True):
        student = Student(lambda x, t: weight * field(x, t), (3,), 4, 3.0, sampler=sampler, checkpoint=checkpoint)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            samples = student.generate(NOISE, {}, with_gradient=True)
        saved.append(sum(sizes))
        gradients.append(torch.autograd.grad(samples.square().sum(), weight)[0])
    assert torch.equal(*gradients)
    assert saved[1] < saved[0]


def test_fresh_noise_needs_euler_steps() -> None:
    with pytest.raises(ValueError, match=r"gamma and second_time need sampler='euler', got 'dpm\+\+'"):
        Student(field, (3,), 4, sampler="dpm++", gamma=0.5)
