"""NaN put into each place: the promised reaction, and nothing non-finite in a checkpoint or an average."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfd_fast import mean_velocity
from mfd_fast.config import Settings
from mfd_fast.data.dataset import Dataset
from mfd_fast.distillation import distill
from mfd_fast.methods.mfd import MeanFlowDistillation
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.run_folder import RunFolder
from mfd_fast.task import Task
from mfd_fast.training import loop
from mfd_fast.training.checkpoint import list_checkpoints, load_checkpoint
from mfd_fast.training.context import make_context
from mfd_fast.training.distill import DistillTraining
from mfd_fast.training.ema import WeightAverage
from mfd_fast.training.teacher import train_teacher
from mfd_fast.types import Status

Make = Callable[..., Settings]
Teacher = Callable[..., VelocityNetwork]
NAN = float("nan")


class Spoilt(nn.Module):
    """A teacher that knows nothing about label 2."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        velocity: Tensor = self.network(x, t, label)
        return torch.where((label == 2).unsqueeze(1), NAN, velocity)


def events(log: Path) -> list[dict[str, Any]]:
    return [line for text in log.read_text().splitlines() if "event" in (line := json.loads(text))]


def assert_all_finite(run: RunFolder) -> int:
    """Everything in every checkpoint is finite; how many there are."""
    found = [*list_checkpoints(run.distill_checkpoints()), *list_checkpoints(run.teacher_checkpoints())]
    for path in found:
        for group, tensors in load_checkpoint(path).tensors.items():
            assert [name for name, value in tensors.items() if not value.isfinite().all()] == [], group
    return len(found)


@pytest.fixture
def spoil_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``spoil_rows(update, row, how)``: in a distillation the loss of any rows with that one goes through ``how``."""

    def arrange(update: int, row: int, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        original_draw = DistillTraining._draw

        def draw(self: Any, asked: int, share: Any) -> Any:
            draws, condition = original_draw(self, asked, share)
            hit = asked == update and share.first <= row < share.first + share.rows
            draws.weight = self._roles.parameters(self.cycle.role(asked))[0] if hit else None
            return draws, condition

        def through(original: Any) -> Any:
            def loss(self: Any, actors: Any, batch: Any, *rest: Any) -> Any:
                result, weight = original(self, actors, batch, *rest), batch.draws.weight
                return result if weight is None else result._replace(value=how(result.value, weight))

            return loss

        monkeypatch.setattr(DistillTraining, "_draw", draw)
        for name in ("auxiliary_loss", "student_loss"):
            monkeypatch.setattr(MeanFlowDistillation, name, through(getattr(MeanFlowDistillation, name)))

    return arrange


PLACES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "loss is NaN": (lambda loss, weight: loss * NAN, "loss"),
    "loss is infinite, its gradient finite": (lambda loss, weight: loss + float("inf"), "loss"),
    "gradient is NaN, the loss finite": (lambda loss, weight: loss + (0 * weight).abs().sqrt().sum(), "gradient"),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("role_and_update", [("auxiliary", 4), ("student", 5)])
@pytest.mark.parametrize("place", PLACES)
def test_a_bad_row_skips_one_update_and_is_named(
    place: str,
    role_and_update: tuple[str, int],
    accumulation: int,
    tmp_path: Path,
    tiny_settings: Make,
    tiny_teacher: Teacher,
    labelled_task: Task,
    spoil_rows: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (role, update), (how, cause) = role_and_update, PLACES[place]
    settings = tiny_settings("distill.ema_decay=0.9", f"distill.accumulation={accumulation}")
    spoil_rows(update, 11, how)
    run = RunFolder(tmp_path / "run")
    distill(tiny_teacher(3), settings, labelled_task, run.path)
    (event,) = events(run.path / "log.jsonl")
    assert (event["update"], event["skipped_role"], event["cause"], event["sample"]) == (update + 1, role, cause, 11)
    assert 0 <= event["t"] <= 1
    assert event["time_bin"] == min(9, int(event["t"] * 10))
    assert f"distillation: update {update} of the {role} was skipped" in capsys.readouterr().out
    assert assert_all_finite(run) == 1
    assert run.has_network("student")


def test_the_time_of_the_bad_sample_is_that_of_its_row(
    tmp_path: Path, tiny_settings: Make, tiny_teacher: Teacher, labelled_task: Task, spoil_rows: Any, monkeypatch: Any
) -> None:
    from mfd_fast.streams import RowDraws

    pairs: list[Tensor] = []
    original = RowDraws.pairs

    def note(self: RowDraws, law: Any, equal_share: float) -> tuple[Tensor, Tensor]:
        t, r = original(self, law, equal_share)
        if len(t) == 16:
            pairs.append(t)
        return t, r

    monkeypatch.setattr(RowDraws, "pairs", note)
    spoil_rows(5, 6, PLACES["loss is NaN"][0])
    distill(tiny_teacher(3), tiny_settings(), labelled_task, tmp_path / "run")
    (event,) = events(tmp_path / "run" / "log.jsonl")
    assert event["t"] == pytest.approx(pairs[1][6].item())


def test_a_teacher_that_is_not_finite_for_one_label_ends_in_advice(
    tmp_path: Path, tiny_settings: Make, tiny_teacher: Teacher, labelled_task: Task
) -> None:
    settings = tiny_settings("distill.max_skipped_updates=2", "distill.cycle_auxiliary=0", "distill.checkpoint_every=1")
    run = RunFolder(tmp_path / "run")
    with pytest.raises(FloatingPointError, match=r"3 updates in a row.*the student in update 2: .*Lower the learning"):
        distill(Spoilt(tiny_teacher(3)), settings, labelled_task, run.path)
    assert [event["sample"] is not None for event in events(run.path / "log.jsonl")] == [True] * 3
    assert_all_finite(run)


def test_a_bad_sample_of_the_data_skips_only_the_updates_that_see_it(tmp_path: Path, tiny_settings: Make) -> None:
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    x[3] = NAN
    settings = tiny_settings("teacher.batch_size=5", "teacher.checkpoint_every=1")
    run = RunFolder(tmp_path / "run")
    train_teacher(settings, Dataset("points", x, None, x[:2].nan_to_num(), None), run, make_context(settings.run))
    found = events(run.path / "teacher_log.jsonl")
    assert len(found) == 3, "12 updates of 5 samples are 3 epochs of 20"
    assert [event["skipped"] for event in found] == [1, 2, 3]
    assert {event["cause"] for event in found} == {"loss"}
    assert assert_all_finite(run) == 1
    assert all(value.isfinite().all() for value in run.read_tensors("teacher").values())


@pytest.mark.parametrize("role", ["auxiliary", "student"])
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_weight_that_is_not_finite_ends_the_training_unsaved(
    role: str,
    bad: float,
    tmp_path: Path,
    tiny_settings: Make,
    tiny_teacher: Teacher,
    labelled_task: Task,
    monkeypatch: Any,
) -> None:
    original = DistillTraining.run_update

    def spoil(self: DistillTraining, update: int) -> Any:
        result = original(self, update)
        if update == 7:
            self._roles.parameters(role)[0].data.view(-1)[0] = bad
        return result

    monkeypatch.setattr(DistillTraining, "run_update", spoil)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(
        FloatingPointError, match=rf"weight 0 of the {role} is not finite|{role}/.* is not finite after 8"
    ):
        distill(tiny_teacher(3), tiny_settings("distill.checkpoint_every=1"), labelled_task, run.path)
    assert assert_all_finite(run) == 2


def test_a_save_refuses_what_is_not_finite(
    tmp_path: Path, tiny_settings: Make, tiny_teacher: Teacher, labelled_task: Task, monkeypatch: Any
) -> None:
    original = DistillTraining.after_update

    def spoil(self: DistillTraining, done: int) -> None:
        original(self, done)
        if done == 9:
            next(iter(self._optimizers["student"].tensors().values())).fill_(NAN)

    monkeypatch.setattr(DistillTraining, "after_update", spoil)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(FloatingPointError, match=r"optimizer_student/\S+ is not finite after 9 updates: no checkpoint"):
        distill(tiny_teacher(3), tiny_settings("distill.checkpoint_every=1"), labelled_task, run.path)
    assert assert_all_finite(run) == 2


def test_a_constant_that_is_infinite_is_no_obstacle(
    tmp_path: Path, tiny_settings: Make, tiny_teacher: Teacher, labelled_task: Task
) -> None:
    teacher = tiny_teacher(3)
    teacher.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    distill(teacher, tiny_settings(), labelled_task, tmp_path / "run")
    assert RunFolder(tmp_path / "run").has_network("student")


def test_an_average_takes_in_only_finite_weights() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    average = WeightAverage([weight], 0.5)
    with torch.no_grad():
        weight.copy_(torch.tensor([3.0, NAN, float("inf")]))
    average.update(0)
    torch.testing.assert_close(average.tensors()["0"], torch.tensor([2.8, 2.0, 3.0]))


def test_other_rows_of_a_batch_are_the_same_bits() -> None:
    def field(x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        return torch.where((row == 2).unsqueeze(1) & (t < 0.6).unsqueeze(1), NAN, torch.sin(x) * t.unsqueeze(1))

    x, row = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), torch.arange(6)
    others = row != 2
    for solver in ("euler", "heun", "rk4", "bosh3"):
        spoilt, stats = mean_velocity(
            field, x, 0.9, 0.1, step_size=0.1, solver=solver, condition={"row": row}, return_stats=True
        )
        clean = mean_velocity(field, x, 0.9, 0.1, step_size=0.1, solver=solver, condition={"row": row + 10})
        assert torch.equal(spoilt[others], clean[others]), solver
        assert stats.status.tolist() == [int(Status.NON_FINITE) if bad else 0 for bad in ~others], solver


def test_the_check_before_a_save_sees_every_group() -> None:
    state = {"a": {"x": torch.tensor([1.0, NAN]), "n": torch.tensor([3])}, "b": {"y": torch.tensor(0.0)}}
    assert loop._not_finite(state) == {"a/x"}
