"""What every velocity network of MODELS for labelled samples promises."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast.models import MODELS, build_model, describe_model, model_from_description, null_condition
from mfd_fast.models.base import VelocityNetwork

SHAPE = (2, 8, 8)
CLASSES = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"width": 32, "depth": 2, "time_features": 16},
    "dit": {"width": 32, "depth": 2, "heads": 4, "time_features": 16, "qk_norm": True},
    "unet": {"width": 16, "multipliers": [1, 2], "blocks_per_level": 1, "attention_levels": [1], "time_features": 16},
}

OF_THEIR_OWN = {"occfm": "history and ego motion in place of labels: test_occfm.py"}
"""Models that make other promises, with the reason and the place of their tests."""

each_model = pytest.mark.parametrize("name", sorted(MODELS.keys() - OF_THEIR_OWN.keys()))


def stirred(name: str, num_classes: int | None = CLASSES, dtype: torch.dtype = torch.float32) -> VelocityNetwork:
    """A model away from its initial zeros, so that every input matters."""
    torch.manual_seed(0)
    model = build_model(name, SHAPE, num_classes, **OPTIONS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def inputs(rows: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, *SHAPE, generator=generator, dtype=dtype)
    t = torch.rand(rows, generator=generator)
    return x, t, torch.randint(CLASSES + 1, (rows,), generator=generator)


def test_every_model_has_options_here() -> None:
    assert OPTIONS.keys() | OF_THEIR_OWN.keys() == MODELS.keys()


@each_model
def test_new_model_is_the_zero_velocity(name: str) -> None:
    model = build_model(name, SHAPE, CLASSES, **OPTIONS[name])
    velocity = model(*inputs())
    assert velocity.shape == (5, *SHAPE)
    assert torch.equal(velocity, torch.zeros(5, *SHAPE))


@each_model
def test_result_depends_on_x_t_and_label(name: str) -> None:
    model = stirred(name)
    x, t, label = inputs()
    velocity = model(x, t, label)
    for other in (model(x + 0.1, t, label), model(x, t * 0.9, label), model(x, t, (label + 1) % (CLASSES + 1))):
        assert (other - velocity).flatten(1).norm(dim=1).min() > 1e-4


@each_model
def test_no_label_is_the_null_index(name: str) -> None:
    model = stirred(name)
    x, t, _ = inputs()
    null = model(x, t, torch.full((5,), CLASSES))
    assert torch.equal(model(x, t), null)
    condition = null_condition(model)
    assert condition is not None
    assert condition["label"].shape == (1,)
    assert condition["label"].dtype == torch.int64
    assert torch.equal(model(x, t, **condition), null)


@each_model
def test_a_model_without_classes_takes_no_label(name: str) -> None:
    model = stirred(name, num_classes=None)
    x, t, label = inputs()
    assert null_condition(model) is None
    assert model(x, t).shape == x.shape
    with pytest.raises(ValueError, match="label was given to a model without classes"):
        model(x, t, label)


@each_model
def test_a_row_alone_gets_what_it_gets_in_a_batch(name: str) -> None:
    model = stirred(name)
    x, t, label = inputs()
    together = model(x, t, label)
    assert torch.equal(model(x, t, label), together)
    for row in range(5):
        part = slice(row, row + 1)
        torch.testing.assert_close(model(x[part], t[part], label[part]), together[part], rtol=1e-5, atol=1e-5)


@each_model
def test_gradients_reach_every_parameter(name: str) -> None:
    model = stirred(name)
    x, t, _ = inputs()
    model(x, t, torch.tensor([0, 1, 2, 3, 0])).square().sum().backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unreached == []


@each_model
def test_compiles_to_one_graph_with_equal_results(name: str) -> None:
    model = stirred(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    # Equal to rounding: what is compiled may be written by another formula (GELU by a sigmoid).
    torch.testing.assert_close(compiled(*inputs()), model(*inputs()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled(*inputs()[:2]), model(*inputs()[:2]), rtol=1e-5, atol=1e-6)


@each_model
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)], ids=["float64", "bfloat16"]
)
def test_other_dtypes_follow_float32(name: str, dtype: torch.dtype, tolerance: float) -> None:
    x, t, label = inputs()
    reference = stirred(name)(x, t, label)
    velocity = stirred(name, dtype=dtype)(x.to(dtype), t, label)
    assert velocity.dtype == dtype
    assert (velocity.float() - reference).norm() < tolerance * reference.norm()


@each_model
def test_float64_times_are_taken_in_float64(name: str) -> None:
    model = stirred(name, dtype=torch.float64)
    x, t, label = inputs(dtype=torch.float64)
    later = t.double() + 1e-10
    assert not torch.equal(model(x, later, label), model(x, t.double(), label))


@each_model
def test_autocast_computes_in_bfloat16(name: str) -> None:
    model = stirred(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = model(*inputs())
    reference = model(*inputs())
    assert (velocity.float() - reference).norm() < 0.1 * reference.norm()


@each_model
def test_description_rebuilds_the_model(name: str) -> None:
    model = stirred(name)
    description = json.loads(json.dumps(describe_model(model)))
    again = model_from_description(description)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(*inputs()), model(*inputs()))
    assert describe_model(again) == describe_model(model)
    assert description["model"] == name
    assert description["options"].items() >= OPTIONS[name].items()


@each_model
def test_bad_inputs_are_named(name: str) -> None:
    model = build_model(name, SHAPE, CLASSES, **OPTIONS[name])
    x, t, label = inputs()
    with pytest.raises(ValueError, match=r"x must have shape \[B, 2, 8, 8\], got \[5, 2, 8\]"):
        model(x[..., 0], t, label)
    with pytest.raises(ValueError, match=r"t must have shape \[5\], one time for each row of x, got \[3\]"):
        model(x, t[:3], label)
    with pytest.raises(ValueError, match="label must be int64"):
        model(x, t, label.float())
    with pytest.raises(ValueError, match=r"label must be int64 of shape \[5\] or \[1\]"):
        model(x, t, label[:2])


# torch scripts its forward-mode formulas at the first jvp, with a warning about itself.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_jvp_of_the_mlp_is_its_directional_derivative() -> None:
    model = stirred("mlp", dtype=torch.float64)
    x, t, label = inputs(dtype=torch.float64)
    t = t.double()
    direction, ones = torch.randn_like(x), torch.ones_like(t)
    tangent = torch.func.jvp(lambda a, b: model(a, b, label), (x, t), (direction, ones))[1]
    step = 1e-6
    ahead, behind = (model(x + s * direction, t + s * ones, label) for s in (step, -step))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)
