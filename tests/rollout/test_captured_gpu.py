"""Recorded rollouts with CUDA graphs; what they share with those of the CPU is tested in test_captured.py."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfd_fast
from mfd_fast.intervals import Uniform, sample_pairs
from mfd_fast.rollout import captured

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Network(nn.Module):
    """Like any small network, with dropout and a class label."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.enter, self.leave, self.label = nn.Linear(7, 16), nn.Linear(16, 6), nn.Embedding(4, 16)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.leave(self.dropout(torch.tanh(self.enter(torch.cat([x, t[:, None]], 1)) + self.label(label))))


def problem(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    t, r = sample_pairs(Uniform(), rows, generator=generator)
    r[0] = t[0]
    return x, t, r, {"label": torch.randint(0, 3, (rows,), generator=generator)}


def halve(network: Network) -> None:
    for parameter in network.parameters():
        parameter.data.copy_(0.5 * parameter.data)


def replace(network: Network) -> None:
    for parameter in network.parameters():
        parameter.data = 0.5 * parameter.data


def train(network: Network) -> None:
    network.dropout.p = 1.0  # nothing random about it
    network.train()


def on_cuda(value: Any) -> Any:
    return {name: part.cuda() for name, part in value.items()} if isinstance(value, dict) else value.cuda()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("solver", ["euler", "ab2", "rk4"])
def test_cuda_graphs_equal_eager_without_synchronising(solver: str, guided: bool) -> None:
    captured.forget_all()
    network = Network().eval().cuda()
    options = {"solver": solver, "step_size": 0.1}
    if guided:
        options |= {"negative_condition": {"label": torch.tensor([3], device="cuda")}, "guidance_scale": 4.5}
    for seed, max_rows in ((0, None), (1, None), (2, 6)):
        x, t, r, condition = problem(13, seed)
        given = (network, x.cuda(), t, r)
        how = {"condition": on_cuda(condition), "max_rows": max_rows, **options}
        eager = mfd_fast.mean_velocity(*given, runner="eager", **how)
        mfd_fast.mean_velocity(*given, runner="captured", **how)
        halve(network)
        expected = mfd_fast.mean_velocity(*given, runner="eager", **how)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = mfd_fast.mean_velocity(*given, runner="captured", **how)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, eager, rtol=1e-4, atol=1e-5)
    captured.forget_all()


@pytest.mark.gpu
@on_gpu
def test_cuda_graphs_on_another_stream_and_after_new_weights() -> None:
    captured.forget_all()
    network = Network().eval().cuda()
    x, t, r, condition = problem(9)
    given, how = (network, x.cuda(), t, r), {"condition": on_cuda(condition), "step_size": 0.1}
    for change in (None, replace, train):
        if change is not None:
            change(network)
        expected = mfd_fast.mean_velocity(*given, runner="eager", **how)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = mfd_fast.mean_velocity(*given, runner="captured", **how)
        stream.synchronize()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    captured.forget_all()


@pytest.mark.gpu
@on_gpu
def test_a_field_that_waits_for_the_device_cannot_be_recorded() -> None:
    class Waiting(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * float(t[0])

    x = torch.randn(4, 3, device="cuda")
    with pytest.raises(ValueError, match="recording it failed"):
        mfd_fast.mean_velocity(Waiting(), x, 1.0, 0.0, runner="captured")
    assert bool(mfd_fast.mean_velocity(Waiting(), x, 1.0, 0.0, runner="eager").isfinite().all())
    # A capture that had failed would have left its stream behind, and a generator that waits for its end.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(3, device="cuda").isfinite().all()
