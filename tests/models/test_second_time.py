"""Networks with a second time: the teacher at first, a function of r once trained; and their features."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfd_fast.fields import autocast
from mfd_fast.models import build_model
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.models.lora import LoRARoles

MODELS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "mlp": ((3,), {"width": 16, "depth": 2}),
    "dit": ((1, 4, 4), {"width": 16, "depth": 2, "heads": 2}),
    "unet": ((1, 8, 8), {"width": 8, "multipliers": [1, 2], "blocks_per_level": 1, "time_features": 16}),
}


@pytest.fixture(params=MODELS)
def network(request: pytest.FixtureRequest) -> VelocityNetwork:
    """A labelled network with random weights."""
    shape, options = MODELS[request.param]
    torch.manual_seed(0)
    model = build_model(request.param, shape, 3, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def inputs(network: VelocityNetwork) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, *network.sample_shape), torch.rand(4), torch.tensor([0, 1, 2, 3])


def test_a_second_time_changes_nothing_at_first_and_something_later(network: VelocityNetwork) -> None:
    x, t, label = inputs(network)
    two = network.with_second_time()
    expected = network(x, t, label)
    assert torch.equal(two(x, t, label, r=t / 2), expected)
    assert torch.equal(two(x, t, label), expected)
    assert set(two.state_dict()) - set(network.state_dict()) == {
        "condition.second_time.weight",
        "condition.second_time.bias",
    }
    assert two.condition.second_time is not None
    nn.init.normal_(two.condition.second_time.weight)
    assert not torch.allclose(two(x, t, label, r=t / 2), two(x, t, label, r=t))
    torch.testing.assert_close(two(x, t, label), two(x, t, label, r=t))
    with pytest.raises(ValueError, match=r"r was given to a network with one time; network.with_second_time\(\)"):
        network(x, t, label, r=t)


def test_features_have_one_row_per_sample_and_see_everything(network: VelocityNetwork) -> None:
    x, t, label = inputs(network)
    model: Any = network
    features = model.features(x, t, label)
    assert features.shape == (4, network.feature_width)
    for other in (model.features(x + 1, t, label), model.features(x, 1 - t, label), model.features(x, t, 3 - label)):
        assert not torch.allclose(features, other)
    torch.testing.assert_close(model.features(x[1:2], t[1:2], label[1:2]), features[1:2])
    half: Any = autocast(network, torch.bfloat16)
    torch.testing.assert_close(half.features(x, t, label=label).float(), features, rtol=0.05, atol=0.1)


def test_features_of_a_role_have_its_adapter() -> None:
    torch.manual_seed(0)
    teacher = build_model("mlp", (3,), 3, width=16, depth=2)
    roles = LoRARoles(teacher, rank=2, alpha=2.0)
    x, t, label = inputs(teacher)
    model: Any = teacher
    assert torch.equal(roles.auxiliary.features(x, t, label=label), model.features(x, t, label))
    for parameter in roles.parameters("auxiliary"):
        nn.init.normal_(parameter)
    assert not torch.allclose(roles.auxiliary.features(x, t, label=label), model.features(x, t, label))
    assert torch.equal(roles.teacher.features(x, t, label=label), model.features(x, t, label))
    assert getattr(roles.auxiliary, "feature_width", None) == 16
    assert roles.rows.spans == ()
