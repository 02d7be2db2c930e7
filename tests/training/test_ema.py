import pytest
import torch
from torch import nn

from mfd_fast.training.ema import WeightAverage


def test_average_follows_its_formula() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    average = WeightAverage([weight], 0.6)
    expected = torch.zeros(2, dtype=torch.float64)
    for update in range(1, 30):
        weight.data.normal_(generator=torch.Generator().manual_seed(update))
        average.update(update)
        decay = min(0.6, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(average.tensors()["0"], expected, rtol=1e-12, atol=0)


def test_decay_zero_is_the_weights_themselves() -> None:
    weight = nn.Parameter(torch.zeros(3))
    average = WeightAverage([weight], 0.0)
    weight.data.normal_(generator=torch.Generator().manual_seed(0))
    average.update(1)
    assert torch.equal(average.tensors()["0"], weight)


def test_applied_shows_the_average_and_restores_every_bit() -> None:
    layer = nn.Linear(3, 2)
    average = WeightAverage(list(layer.parameters()), 0.9)
    start = [parameter.detach().clone() for parameter in layer.parameters()]
    for parameter in layer.parameters():
        parameter.data.normal_()
    kept = [parameter.detach().clone() for parameter in layer.parameters()]
    memory = [parameter.data_ptr() for parameter in layer.parameters()]
    with average.applied():
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), start, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), kept, strict=True))
    assert [parameter.data_ptr() for parameter in layer.parameters()] == memory
    assert all(torch.equal(value, start[int(name)]) for name, value in average.tensors().items())


def test_applied_restores_after_an_error() -> None:
    weight = nn.Parameter(torch.zeros(2))
    average = WeightAverage([weight], 0.9)
    weight.data.fill_(3.0)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert weight.tolist() == [3.0, 3.0]


def test_loaded_average_continues() -> None:
    weight = nn.Parameter(torch.ones(2))
    first, second = WeightAverage([weight], 0.5), WeightAverage([nn.Parameter(torch.zeros(2))], 0.5)
    second.load(first.tensors())
    assert torch.equal(second.tensors()["0"], torch.ones(2))
    first.tensors()["0"].fill_(7.0)
    assert torch.equal(second.tensors()["0"], torch.ones(2)), "what was loaded is a copy"
