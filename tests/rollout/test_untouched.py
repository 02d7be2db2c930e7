"""What belongs to the caller stays as it was."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfd_fast import integrate, mean_velocity, mean_velocity_pair
from mfd_fast.models.lora import LoRARoles


class _Network(nn.Module):
    """With everything a careless library could change: buffers, dropout, hooks, frozen and free weights."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.dropout = nn.Linear(2, 8), nn.Linear(8, 2), nn.Dropout(0.0)
        self.label = nn.Embedding(4, 8)
        self.register_buffer("constant", torch.ones(1))
        self.enter.weight.requires_grad_(False)
        self.register_forward_hook(lambda *_: None)
        self.leave.eval()

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        hidden = torch.tanh(self.enter(x) + self.label(label) + t[:, None] * self.constant)
        velocity: Tensor = self.leave(self.dropout(hidden))
        return velocity


def _state(module: nn.Module) -> dict[str, Any]:
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "identities": [id(parameter) for parameter in module.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in module.parameters()],
        "grads": [parameter.grad for parameter in module.parameters()],
        "training": [part.training for part in module.modules()],
        "hooks": [
            (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
            for part in module.modules()
        ],
        "attributes": [sorted(vars(part)) for part in module.modules()],
    }


@pytest.mark.parametrize("kwargs", [{"steps": 3}, {"solver": "bosh3"}, {"steps": 3, "differentiable": True}], ids=str)
def test_module_and_arguments(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = _Network()
    before = _state(module)
    x, t, r = torch.randn(4, 2), torch.tensor([0.5, 1.0, 0.2, 0.3]), torch.tensor([0.0, 0.1, 0.2, 0.9])
    condition = {"label": torch.tensor([0, 1, 2, 3])}
    negative = {"label": torch.tensor([3])}
    arguments = copy.deepcopy((x, t, r, condition, negative))
    generator = torch.get_rng_state()
    roles = LoRARoles(module, rank=2, alpha=1.0)
    for function in (mean_velocity, integrate):
        function(module, x, t, r, condition=condition, negative_condition=negative, guidance_scale=2.0, **kwargs)
    mean_velocity_pair(roles.teacher, roles.auxiliary, x, t, r, condition=condition, **kwargs)

    after = _state(module)
    weights = before.pop("weights"), after.pop("weights")
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert before == after
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(a, b) for a, b in zip((x, t, r), arguments[:3], strict=True))
    assert torch.equal(condition["label"], arguments[3]["label"])
    assert list(condition) == list(negative) == ["label"]


def test_the_field_gets_its_own_training_mode() -> None:
    seen = []

    class Module(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append(self.training)
            return x

    for training in (True, False):
        mean_velocity(Module().train(training), torch.ones(1, 1), 1.0, 0.0, steps=2)
    assert seen == [True, True, False, False]


def test_the_result_does_not_share_memory_with_x() -> None:
    x = torch.ones(2, 2)
    for r in (0.0, 1.0):
        integrate(lambda x, t: x, x, 1.0, r, steps=2).zero_()
        assert torch.equal(x, torch.ones(2, 2))
