"""Building models by name: what is refused, and how the message helps."""

from typing import Any

import pytest
import torch
from torch import nn

from mfd_fast.models import build_model, describe_model, model_from_description, null_condition
from mfd_fast.models.unet import UNET_PRESETS


def test_the_32x32_preset_has_about_42_million_parameters() -> None:
    with torch.device("meta"):
        model = build_model("unet", (3, 32, 32), None, **UNET_PRESETS["32x32"])
    assert 40e6 < sum(parameter.numel() for parameter in model.parameters()) < 44e6
    assert model(torch.empty(2, 3, 32, 32, device="meta"), torch.empty(2, device="meta")).shape == (2, 3, 32, 32)


def test_the_8x8_preset_fits_the_digits() -> None:
    model = build_model("unet", (1, 8, 8), 10, **UNET_PRESETS["8x8"])
    assert model(torch.zeros(2, 1, 8, 8), torch.zeros(2)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mpl", {}, r"unknown model 'mpl'; did you mean 'mlp'\? Valid: mlp, dit, unet"),
        ("zzzzz", {}, r"unknown model 'zzzzz'\. Valid: mlp, dit, unet"),
        ("mlp", {"widht": 8}, r"unknown option 'widht' of 'mlp'; did you mean 'width'\? Valid: width, depth"),
        ("mlp", {"width": "8"}, "option 'width' of 'mlp' must be int, got '8'"),
        ("mlp", {"width": 8.0}, r"option 'width' of 'mlp' must be int, got 8\.0"),
        ("mlp", {"width": True}, "option 'width' of 'mlp' must be int, got True"),
        ("mlp", {"depth": 0}, "depth must be an integer of at least 1, got 0"),
        ("mlp", {"time_features": 7}, "time_features must be an even number of at least 2, got 7"),
        ("dit", {"qk_norm": 1}, "option 'qk_norm' of 'dit' must be bool, got 1"),
        ("dit", {"mlp_ratio": True}, "option 'mlp_ratio' of 'dit' must be float, got True"),
        ("dit", {"mlp_ratio": 0.0}, r"width \* mlp_ratio must be an integer of at least 1, got 0"),
        ("dit", {"width": 30}, r"width must be divisible by 4 and by heads \(8\), got 30"),
        ("dit", {"patch_size": 3}, r"sides divisible by patch_size \(3\), got \(1, 8, 8\)"),
        ("dit", {"attention": "flash"}, "unknown attention backend 'flash'; did you mean 'flash-attn'"),
        ("unet", {"multipliers": [1, "2"]}, r"option 'multipliers' of 'unet' must be Sequence\[int\], got"),
        ("unet", {"multipliers": []}, r"multipliers must be one or more positive integers, got \[\]"),
        ("unet", {"multipliers": [1] * 5}, "sides divisible by 16 for 5 levels"),
        ("unet", {"attention_levels": [4]}, r"attention_levels must be in 0\.\.3, got \[4\]"),
        ("unet", {"dropout": 1.0}, r"dropout must be at least 0 and less than 1, got 1\.0"),
        ("unet", {"width": 0}, "width must be an integer of at least 1, got 0"),
        ("unet", {"attention": "xformer"}, "unknown attention backend 'xformer'; did you mean 'xformers'"),
    ],
)
def test_wrong_names_and_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(name, (1, 8, 8), 10, **options)


@pytest.mark.parametrize(
    ("shape", "num_classes", "message"),
    [
        ((), 10, r"sample_shape must be one or more positive integers, got \(\)"),
        ((1, 0), 10, "sample_shape must be one or more positive integers"),
        ((2,), 0, "num_classes must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_shapes_and_classes_are_refused(shape: tuple[int, ...], num_classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model("mlp", shape, num_classes)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_picture_models_refuse_vectors(name: str) -> None:
    with pytest.raises(ValueError, match=r"sample_shape must be \(channels, height, width\)"):
        build_model(name, (2,))


def test_the_mlp_takes_vectors() -> None:
    assert build_model("mlp", (2,), None, width=8)(torch.zeros(3, 2), torch.zeros(3)).shape == (3, 2)


def test_a_whole_number_is_a_float_option() -> None:
    assert build_model("dit", (1, 8, 8), width=32, depth=1, mlp_ratio=2).options["mlp_ratio"] == 2


def test_dropout_acts_in_training_only() -> None:
    model = build_model("unet", (1, 8, 8), width=16, multipliers=[1], attention_levels=[0], dropout=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert not torch.equal(model(x, t), model(x, t))
    model.eval()
    assert torch.equal(model(x, t), model(x, t))


def test_a_class_outside_the_registry_has_no_description() -> None:
    class Own(nn.Module):
        pass

    with pytest.raises(ValueError, match="is not one of MODELS"):
        describe_model(Own())  # type: ignore[arg-type]


def test_a_description_must_be_complete() -> None:
    with pytest.raises(ValueError, match="the description of a model lacks num_classes, options; it has model, sample"):
        model_from_description({"model": "mlp", "sample_shape": [2]})


def test_null_condition_of_fields_that_are_no_models() -> None:
    class Closed:
        num_classes = 4

    assert null_condition(lambda x, t: x) is None
    condition = null_condition(Closed())
    assert condition is not None
    assert condition["label"].tolist() == [4]
