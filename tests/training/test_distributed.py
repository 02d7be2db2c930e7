"""Two processes under torchrun against one process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mfd_fast.config import Settings
from mfd_fast.distillation import distill
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.run_folder import RunFolder
from mfd_fast.settings_io import to_toml
from mfd_fast.task import Task
from mfd_fast.training import distributed
from mfd_fast.training.distributed import World

WORKER = """
import json, os, sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mfd_fast.cli import main
from mfd_fast.distillation import distill
from mfd_fast.task import Task
from mfd_fast.models import build_model
from mfd_fast.settings_io import load_settings
from mfd_fast.streams import RowDraws
from mfd_fast.training.distill import DistillTraining
from mfd_fast.training.context import make_context
from mfd_fast.training.distributed import leave_world

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
settings = load_settings(file=folder / "settings.toml")
# The command line in one folder for both, which exists already. A process can join its world only once.
sys.modules["mfd_fast.cli.main"].leave_world = lambda: None
train = ["train-teacher", "--settings", str(folder / "settings.toml"), "--run", str(folder / "shared"), "--fresh"]
told = {"code": main(train), "world": make_context(settings.run).world.size}

teacher = build_model("mlp", (2,), 3, width=16, depth=1)
if rank == 0:  # the other process starts from other weights and gets these
    teacher.load_state_dict(load_file(folder / "teacher.safetensors"))
label = torch.tensor([0] * 8 + [1] * 4 + [2])
task = Task((2,), {"label": label}, {"label": torch.tensor([3])}, (8, 4, 1))

seen = []
normal, pairs = RowDraws.normal, RowDraws.pairs

def note_normal(self, shape):
    seen.append(normal(self, shape))
    return seen[-1]

def note_pairs(self, law, equal_share):
    t, r = pairs(self, law, equal_share)
    seen.append(t)
    return t, r

RowDraws.normal, RowDraws.pairs = note_normal, note_pairs
final = {}
run_update = DistillTraining.run_update

def keep_roles(self, update):
    result = run_update(self, update)
    for role in ("auxiliary", "student"):
        final.update({f"{role}/{name}": value.clone() for name, value in self._roles.state_dict(role).items()})
    return result

DistillTraining.run_update = keep_roles
# Each process is told another folder, so that it shows who writes.
distill(teacher, settings, task, folder / f"run-{rank}")
save_file(final, folder / f"final-{rank}.safetensors")
save_file({str(index): value.contiguous() for index, value in enumerate(seen)}, folder / f"seen-{rank}.safetensors")

try:
    distill(teacher, load_settings(file=folder / "odd.toml"), task, folder / f"odd-{rank}")
except ValueError as error:
    told["odd"] = str(error)

(folder / f"told-{rank}.json").write_text(json.dumps(told))
leave_world()
"""


@pytest.fixture
def launched(
    tmp_path: Path, tiny_settings: Callable[..., Settings], tiny_teacher: Callable[..., VelocityNetwork]
) -> Callable[[Settings], dict[str, Any]]:
    """Runs `WORKER` in two processes; everything they left, by rank."""

    def launch(settings: Settings) -> dict[str, Any]:
        folder = tmp_path / "two"
        run = RunFolder(folder)
        run.write_network("teacher", dict(tiny_teacher(3).state_dict()), {})
        (folder / "settings.toml").write_text(to_toml(settings))
        (folder / "odd.toml").write_text(to_toml(tiny_settings("distill.batch_size=15")))
        RunFolder(folder / "shared").write_settings(settings)
        (folder / "shared" / "old").touch()
        (folder / "worker.py").write_text(WORKER)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "MASTER"))}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*torchrun, str(folder / "worker.py"), str(folder)],
            env=clean | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        by_rank: dict[str, Any] = {"stdout": done.stdout, "folder": folder}
        by_rank["told"] = [json.loads((folder / f"told-{rank}.json").read_text()) for rank in (0, 1)]
        for name in ("final", "seen"):
            by_rank[name] = [load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1)]
        return by_rank

    return launch


@pytest.mark.timeout(240)
def test_two_processes_equal_one(
    launched: Callable[[Settings], dict[str, Any]],
    tmp_path: Path,
    tiny_settings: Callable[..., Settings],
    tiny_teacher: Callable[..., VelocityNetwork],
    labelled_task: Task,
) -> None:
    settings = tiny_settings(
        *("distill.ema_decay=0.5", "distill.guidance_scale=1.5", "run.threads=1", "distill.student_updates=4"),
        *(f"distill.{role}_optimizer.eps=1e-3" for role in ("auxiliary", "student")),
    )
    two = launched(settings)
    folder = two["folder"]
    assert [told["world"] for told in two["told"]] == [2, 2]

    seen: list[dict[str, Tensor]] = two["seen"]
    assert len(seen[0]) == 4 * (2 * 2 + 3)
    assert all(len(value) == 8 for value in seen[0].values())
    assert not any(torch.equal(value, seen[1][name]) for name, value in seen[0].items())

    final: list[dict[str, Tensor]] = two["final"]
    assert [name for name, value in final[0].items() if not torch.equal(value, final[1][name])] == []

    one = RunFolder(tmp_path / "one")
    distill(tiny_teacher(3), settings, labelled_task, one.path)
    alone, together = one.read_tensors("student"), RunFolder(folder / "run-0").read_tensors("student")
    start = tiny_teacher(3).state_dict()
    assert max((value - start[name]).abs().max().item() for name, value in alone.items()) > 1e-3
    assert max((value - alone[name]).abs().max().item() for name, value in together.items()) < 1e-5

    logs = [(run / "log.jsonl").read_text().splitlines() for run in (one.path, folder / "run-0")]
    for line, other in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)
        if line["role"] == "student":  # a root mean square over the whole batch
            assert other["velocity_gap"] == pytest.approx(line["velocity_gap"], rel=1e-4)

    assert not (folder / "run-1").exists(), "only the first process writes"
    assert two["stdout"].count("distillation: 12/12 updates") == 1
    for told in two["told"]:
        assert "batch_size must be a multiple of processes x accumulation = 2 x 1, got 15" in told["odd"]
        assert told["code"] == 0
    assert RunFolder(folder / "shared").has_network("teacher")
    assert not (folder / "shared" / "old").exists()


@pytest.fixture
def fake_messages(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A second process that always sends what was put into this list."""
    other: list[Tensor] = []

    def all_reduce(values: Tensor) -> None:
        values.add_(other.pop(0))

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "gloo")
    return other


@pytest.mark.parametrize(("own", "others", "same"), [(3.0, 3.0, True), (3.0, 4.0, False), (4.0, 3.0, False)])
def test_whether_a_number_is_the_same_everywhere(
    own: float, others: float, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = iter([others, -others])

    def all_reduce(values: Tensor, op: Any) -> None:
        values.clamp_(max=next(peer))

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "gloo")
    assert World(0, 2).same(own) is same
    assert World().same(own)


def test_gradients_are_averaged_in_one_message(fake_messages: list[Tensor]) -> None:
    first, without, second = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 1, 3))
    first.grad, second.grad = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])
    fake_messages.append(torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0]))
    World(0, 2).average_gradients([first, without, second])
    assert first.grad.tolist() == [2.0, 2.0]
    assert without.grad is None
    assert second.grad.tolist() == [2.0, 2.0, 2.0]


def test_what_was_not_measured_does_not_count_in_a_mean(fake_messages: list[Tensor]) -> None:
    fake_messages.append(torch.tensor([[4.0, 5.0, 0.0], [1.0, 1.0, 0.0]]))
    mean = World(0, 2).mean(torch.tensor([2.0, float("nan"), float("nan")]))
    assert mean[:2].tolist() == [3.0, 5.0]
    assert mean[2].isnan()


def test_values_are_broadcast_whatever_their_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(values: Tensor, src: int) -> None:
        assert src == 0
        assert values.is_contiguous()
        values.fill_(7.0)

    monkeypatch.setattr(distributed.dist, "broadcast", broadcast)
    base = torch.zeros(2, 3)
    World(1, 2).broadcast([base[:, 1], base.t()[2]])
    assert base.tolist() == [[0.0, 7.0, 7.0]] * 2


@pytest.mark.parametrize("other", [0.0, 1.0])
def test_a_flag_of_any_process_counts(fake_messages: list[Tensor], other: float) -> None:
    fake_messages += [torch.tensor([other]), torch.tensor([other])]
    assert World(0, 2).any(True)
    assert World(1, 2).any(False) == bool(other)
