"""Result codes and protocols."""

import torch
from torch import Tensor, nn

from mfd_fast import SharedBackbone, Status
from mfd_fast.models.lora import LoRARoles
from mfd_fast.types import RowGroup, shares_backbone


def test_codes_are_pinned() -> None:
    """They are stored in tensors and known to the compiled core."""
    assert {status.name: status.value for status in Status} == {
        "SUCCESS": 0,
        "MAX_EVALUATIONS": 1,
        "STEP_SIZE_UNDERFLOW": 2,
        "NON_FINITE": 3,
        "RUNNING": 4,
    }


def test_every_code_has_a_sentence() -> None:
    messages = [status.message for status in Status]
    assert len(set(messages)) == len(Status)
    assert all(message.endswith(".") for message in messages)
    assert "max_evaluations" in Status.MAX_EVALUATIONS.message


def test_a_module_with_a_part_called_backbone_does_not_share_it() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(2, 2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            velocity: Tensor = self.backbone(x)
            return velocity

    module = Detector()
    assert not isinstance(module, SharedBackbone)
    assert not shares_backbone(module)
    role = LoRARoles(module, rank=1, alpha=1.0).teacher
    assert isinstance(role, SharedBackbone)
    x, t = torch.randn(3, 2), torch.rand(3)
    (velocity,) = role.evaluate_groups([RowGroup(role, x, t, {})])
    assert torch.equal(velocity, module(x, t))


def test_a_role_may_hold_its_backbone_as_a_submodule() -> None:
    """Which ``isinstance`` does not find from Python 3.12 on."""

    class Role(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(2, 2)

        def evaluate_groups(self, groups: list[RowGroup]) -> list[Tensor]:
            return [self.backbone(group.x) for group in groups]

    assert shares_backbone(Role())
    assert not shares_backbone(Role().backbone)
