"""What a method needs is checked before a run, and each message names the setting that helps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfd_fast.config import DistillSettings, OptimizerSettings, RolloutSettings
from mfd_fast.methods import METHODS, MethodOptions, make_method
from mfd_fast.methods.base import Needs
from mfd_fast.ops.linear import onednn_linear
from mfd_fast.student import Student
from mfd_fast.training.conditions import ConditionTable
from mfd_fast.training.requirements import check_derivative, check_runner, check_settings, check_task


def needs(method: str, **own: Any) -> Needs:
    return make_method(method, MethodOptions(own=own)).needs


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "imm",
            {"guidance_scale": 2.0},
            r"'imm' learns from data alone, so distill.guidance_scale must be 1.0; got 2.0",
        ),
        ("meanflow", {"roles": "lora"}, "a network that has a second time: set distill.roles to full"),
        ("cd", {"roles": "lora-student", "zero_stage": 2}, "LoRA roles are too small"),
        ("meanflow", {"roles": "lora-student"}, "set distill.roles to full, got 'lora-student'"),
        ("senseflow", {"roles": "lora-student"}, "distill.roles to full, or distill.method_options.ida_decay to 1"),
        ("senseflow", {"roles": "lora"}, "distill.roles to full, or distill.method_options.ida_decay to 1"),
        ("dmd2", {"student_steps": 2}, "set distill.student_gamma to 1.0, got 0.0"),
        ("cd", {"student_steps": 2, "student_gamma": 0.5}, "set distill.student_gamma to 1.0, got 0.5"),
        (
            "vsd",
            {"teacher_weights": "int8"},
            "'int8' is for distill.method 'mfd', .*: set it to float, got method 'vsd'",
        ),
        ("mfd", {"teacher_weights": "fp8", "zero_stage": 1}, "set it to float for ZeRO"),
        ("imm", {"batch_size": 30}, "groups of 4 samples: distill.batch_size must be a multiple of .* = 4, got 30"),
        ("imm", {"batch_size": 36, "accumulation": 2}, "4 x accumulation x processes = 8, got 36"),
        ("cd", {"compile": "on"}, "'cd' has no auxiliary, and only updates with one are compiled: set .* to auto"),
    ],
)
def test_settings_that_do_not_fit(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(needs(method), DistillSettings(method=method, **settings))


def test_a_runner_that_the_device_does_not_have() -> None:
    cpu = torch.device("cpu")
    for runner in ("auto", "eager", "compiled"):
        check_runner(DistillSettings(rollout=RolloutSettings(runner=runner)), cpu)
    with pytest.raises(ValueError, match="runner 'captured' is not possible here: CUDA graphs need a CUDA device"):
        check_runner(DistillSettings(rollout=RolloutSettings(runner="captured")), cpu)


@pytest.mark.parametrize("method", METHODS)
def test_defaults_fit_every_method(method: str) -> None:
    check_settings(needs(method), DistillSettings(method=method))
    assert isinstance(DistillSettings().discriminator_optimizer, OptimizerSettings)


def test_options_may_take_a_need_away() -> None:
    assert needs("dmd2").data
    assert not needs("dmd2", gan_weight=0.0).data
    assert needs("senseflow", gan_weight=0.0).data, "noised data are half of the student's inputs"
    assert not needs("senseflow", ida_decay=1.0).same_weights
    assert needs("meanflow").teacher
    assert not needs("meanflow", velocity="data").teacher
    assert not needs("cd").derivative
    assert needs("cd", mode="continuous").derivative


class Plain(nn.Module):
    """A teacher without anything beyond a velocity."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("method", "own", "message"),
    [
        ("dmd2", {}, r"give Plain a method features.*or set distill.method_options.gan_weight to 0"),
        ("ayf", {}, r"give Plain a method with_second_time\(\).*or use a method with one time: mfd, vsd"),
        ("meanflow", {"start": "random"}, "with_second_time"),
        ("senseflow", {"guidance_range": [2.0, 8.0]}, "the teacher has no negative condition"),
    ],
)
def test_a_teacher_that_lacks_something(method: str, own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_task(needs(method, **own), method, Plain(), torch.zeros(3, 2), None)


def test_a_plain_teacher_can_be_distilled_by_the_others() -> None:
    for method in ("mfd", "vsd", "cd", "reflow"):
        check_task(needs(method), method, Plain(), torch.zeros(3, 2), None)


class Hidden(nn.Module):
    """A network whose middle is an operation that drops tangents without a word."""

    def __init__(self, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.operation = nn.Parameter(torch.randn(2, 2)), operation

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.operation(x + t[:, None], self.weight, None)


def test_a_derivative_that_gets_lost_is_found() -> None:
    conditions = ConditionTable({}, None, 0)
    good, bad = (Student(Hidden(operation), (2,)) for operation in (nn.functional.linear, onednn_linear))
    check_derivative(good, conditions, exact=True)
    with pytest.raises(ValueError, match=r"derivative of the student's network is wrong.*to finite-difference"):
        check_derivative(bad, conditions, exact=True)


@pytest.mark.parametrize(
    ("method", "own", "message"),
    [
        ("mfd", {"weight": "kl"}, r"distill.method_options must be left out: this method has no options; got 'weight'"),
        ("vsd", {"wieght": "kl"}, r"must be one of weight, min_time; got 'wieght' \(did you mean 'weight'\?\)"),
        ("vsd", {"weight": "kll"}, r"distill.method_options.weight must be one of 'kl'.*did you mean 'kl'"),
        ("dmd2", {"gan_weight": -1.0}, r"distill.method_options.gan_weight must be float, at least 0; got -1.0"),
        ("cd", {"bins_start": 20, "bins_end": 10}, r"bins_end must be at least bins_start = 20; got 10"),
        ("meanflow", {"kappa": 0.5}, r"kappa and omega need velocity = data; got 0.5"),
        ("imm", {"max_time": 1.0}, r"max_time must lie between min_time and 1; got 1.0"),
    ],
)
def test_options_of_a_method_are_checked(method: str, own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method(method, MethodOptions(own=own))
