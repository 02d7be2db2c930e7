"""`run.deterministic`: what it switches on, and that it refuses what cannot repeat itself."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mfd_fast.config import RunSettings, Settings
from mfd_fast.distillation import distill
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.run_folder import RunFolder
from mfd_fast.task import Task
from mfd_fast.training.context import make_context


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    cudnn, environment = torch.backends.cudnn, dict(os.environ)
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.deterministic
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0])
    cudnn.benchmark, cudnn.deterministic = before[1:]
    torch.utils.deterministic.fill_uninitialized_memory = fill
    os.environ.clear()
    os.environ.update(environment)


def test_what_it_switches_on() -> None:
    assert not make_context(RunSettings(device="cpu")).exactness()["deterministic"]
    context = make_context(RunSettings(device="cpu", deterministic=True))
    assert context.exactness()["deterministic"]
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_workspace_of_the_users_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    make_context(RunSettings(device="cpu", deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


class Undetermined(nn.Module):
    """Writes several values to one place."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
        velocity: Tensor = self.network(x, t, label)
        return velocity


def test_a_network_that_cannot_repeat_itself_is_refused(
    tmp_path: Path,
    tiny_settings: Callable[..., Settings],
    tiny_teacher: Callable[..., VelocityNetwork],
    labelled_task: Task,
) -> None:
    distill(Undetermined(tiny_teacher(3)), tiny_settings(), labelled_task, tmp_path / "free")
    with pytest.raises(RuntimeError, match=r"put_.* does not have a deterministic implementation"):
        distill(
            Undetermined(tiny_teacher(3)), tiny_settings("run.deterministic=true"), labelled_task, tmp_path / "strict"
        )


@pytest.mark.parametrize("roles", ["full", "lora"])
def test_two_runs_have_the_same_bits(
    roles: str,
    tmp_path: Path,
    tiny_settings: Callable[..., Settings],
    tiny_teacher: Callable[..., VelocityNetwork],
    labelled_task: Task,
) -> None:
    settings = tiny_settings("run.deterministic=true", f"distill.roles={roles}", "distill.ema_decay=0.9")
    students = []
    for name in ("one", "two"):
        torch.rand(1)  # a process is never in the same state twice
        distill(tiny_teacher(3), settings, labelled_task, tmp_path / name)
        students.append(RunFolder(tmp_path / name).read_tensors("student"))
    assert all(torch.equal(students[0][key], students[1][key]) for key in students[0])
