"""The loop with a training that does nothing, so that its own behaviour shows."""

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from mfd_fast.training.culprit import Culprit
from mfd_fast.training.distributed import World
from mfd_fast.training.interrupts import Interrupted
from mfd_fast.training.loop import LoopOptions, Update, run_training
from mfd_fast.training.optimizing import UpdateReport

ALONE = World()


class Scripted:
    """Notes what it is asked for; updates in ``bad`` report a gradient that is not finite."""

    title = "scripted"

    def __init__(self, total: int, bad: Sequence[int] = (), checkpoint_every: int = 0) -> None:
        self.total_updates = total
        self.bad, self.checkpoint_every = set(bad), checkpoint_every
        self.ran: list[int] = []
        self.after: list[int] = []
        self.random: list[float] = []
        self.before_update: Callable[[int], None] = lambda update: None

    def run_update(self, update: int) -> Update:
        self.before_update(update)
        self.ran.append(update)
        self.random.append(torch.rand(()).item())
        skipped = update in self.bad
        report = UpdateReport(torch.tensor(float("nan") if skipped else 1.0), 0.1, torch.tensor(skipped))
        return Update("student", report, torch.tensor(float(update)), {"bins": torch.tensor([1.0, float("nan")])})

    def find_culprit(self, update: int) -> Culprit:
        return Culprit("gradient", 3, 0.25)

    def log_due(self, update: int) -> bool:
        return update % 2 == 1

    def checkpoint_due(self, done: int) -> bool:
        return self.checkpoint_every > 0 and done % self.checkpoint_every == 0

    def after_update(self, done: int) -> None:
        self.after.append(done)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"ran": {"updates": torch.tensor(self.ran)}}

    def numbers(self) -> dict[str, Any]:
        return {"count": len(self.ran)}

    def load(self, checkpoint: Checkpoint) -> None:
        self.ran = checkpoint.tensors["ran"]["updates"].tolist()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[str]]:
    def start(training: Scripted, world: World = ALONE, **changes: Any) -> list[str]:
        options = LoopOptions(
            log=tmp_path / "log.jsonl",
            checkpoints=tmp_path / "checkpoints",
            tensorboard=None,
            keep=2,
            seed=0,
            max_skipped=2,
            exactness={"threads": 1},
            fingerprint={"seed": 0, "deep": {"rate": 0.1, "names": ["a"]}},
            resume=False,
        )
        return run_training(training, options._replace(**changes), world)

    return start


def lines(folder: Path) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in every if "event" not in line]


def test_order_of_things(tmp_path: Path, run: Any) -> None:
    training = Scripted(5, checkpoint_every=2)
    assert run(training) == []
    assert training.ran == [0, 1, 2, 3, 4]
    assert training.after == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["update-000004", "update-000005"]
    assert [(line["update"], line["loss"], line["bins"]) for line in lines(tmp_path)] == [
        (2, 1.0, [1.0, None]),
        (4, 3.0, [1.0, None]),
    ]


def test_resume_continues_where_the_checkpoint_is(tmp_path: Path, run: Any) -> None:
    first = Scripted(9)
    first.before_update = lambda update: signal.raise_signal(signal.SIGINT) if update == 3 else None
    with pytest.raises(Interrupted, match=r"scripted stopped after 4 of 9 updates; it is saved in .*checkpoints"):
        run(first)
    assert first.ran == [0, 1, 2, 3], "the update under way is finished"
    second = Scripted(9)
    messages = run(second, resume=True)
    assert messages == [f"scripted: resumed after 4 updates from {tmp_path / 'checkpoints' / 'update-000004'}"]
    assert second.ran == list(range(9))
    assert second.after == [5, 6, 7, 8, 9], "what happens before the first update happens once"


def test_resume_without_a_checkpoint_starts_anew(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    training = Scripted(2)
    with pytest.raises(ValueError, match=r"nothing to resume in .*--resume auto"):
        run(training, resume=True)
    (message,) = run(training, resume="auto")
    assert "nothing to resume in" in message
    assert message in capsys.readouterr().out
    assert training.after == [0, 1, 2]


class Beside(World):
    """A process whose peer found the checkpoint that ``other`` stands for."""

    other = 0.0

    def same(self, value: float) -> bool:
        return value == self.other


@pytest.mark.parametrize("resume", [True, "auto"])
def test_processes_that_see_other_checkpoints_do_not_train_together(
    tmp_path: Path, run: Any, resume: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On machines that do not share the run folder one would begin and the other go on, in each other's messages."""
    wanted = r"processes found different checkpoints in .* \(process 1: {}\): all must see the same run folder"
    run(Scripted(2))
    training, peer = Scripted(4), Beside(1, 2)
    with pytest.raises(ValueError, match=wanted.format("update-000002")):
        run(training, resume=resume, world=peer)
    assert training.ran == []
    monkeypatch.setattr(Beside, "other", 5.0)
    with pytest.raises(ValueError, match=wanted.format("none")):
        run(training, resume=resume, world=peer, checkpoints=tmp_path / "elsewhere")


def test_a_signal_in_the_last_update_changes_nothing(run: Any) -> None:
    training = Scripted(3)
    training.before_update = lambda update: signal.raise_signal(signal.SIGTERM) if update == 2 else None
    run(training)
    assert training.ran == [0, 1, 2]


def test_the_global_random_state_belongs_to_the_update(run: Any) -> None:
    whole, part = Scripted(4), Scripted(4)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    run(whole)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left alone"
    part.before_update = lambda update: signal.raise_signal(signal.SIGINT) if update == 1 else None
    with pytest.raises(Interrupted):
        run(part)
    late = Scripted(4)
    run(late, resume=True)
    assert len(set(whole.random)) == 4
    assert part.random + late.random == whole.random
    other = Scripted(4)
    run(other, seed=1)
    assert set(other.random).isdisjoint(whole.random)


def test_skipped_updates_are_said_counted_and_logged(
    tmp_path: Path, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Scripted(8, bad=[0, 1, 3, 6]))
    said = capsys.readouterr().out
    assert said.count("was skipped, its gradient is not finite") == 4
    assert (
        "scripted: update 3 of the student was skipped, its gradient is not finite "
        "(the gradient of sample 3 at t = 0.25); 3 skipped so far"
    ) in said
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if "event" in line]
    assert [event.pop("update") for event in events] == [1, 2, 4, 7]
    assert events[2] | {"seconds": 0} == {
        **{"seconds": 0, "event": "skipped update", "skipped_role": "student", "cause": "gradient"},
        **{"sample": 3, "t": 0.25, "time_bin": 2, "skipped": 3},
    }
    noted = [(line["skipped"], line["grad_norm"]) for line in lines(tmp_path)]
    assert noted == [(2, None), (3, None), (3, 1.0), (4, 1.0)]


def test_the_count_of_skipped_updates_survives_a_resume(tmp_path: Path, run: Any) -> None:
    first = Scripted(8, bad=[0, 1, 6])
    first.before_update = lambda update: signal.raise_signal(signal.SIGINT) if update == 3 else None
    with pytest.raises(Interrupted):
        run(first)
    run(Scripted(8, bad=[0, 1, 6]), resume=True)
    assert [line["skipped"] for line in lines(tmp_path)] == [2, 2, 2, 3]


def test_too_many_skipped_updates_in_a_row_end_the_training(tmp_path: Path, run: Any) -> None:
    training = Scripted(20, bad=[2, 3, 5, 6, 7, 8], checkpoint_every=5)
    with pytest.raises(
        FloatingPointError, match=r"3 updates in a row .*the student in update 7: the gradient of sample 3.*Lower"
    ):
        run(training)
    assert training.ran[-1] == 7
    (checkpoint,) = list_checkpoints(tmp_path / "checkpoints")
    assert load_checkpoint(checkpoint).state["done"] == 5


def test_settings_that_differ_are_named_one_by_one(run: Any) -> None:
    run(Scripted(2))
    with pytest.raises(ValueError, match=r"cannot be resumed: deep\.rate was 0\.1, is 0\.2; seed was 0, is 1$"):
        run(Scripted(2), resume=True, fingerprint={"seed": 1, "deep": {"rate": 0.2, "names": ["a"]}})
    with pytest.raises(ValueError, match=r"deep\.new was None, is 5$"):
        run(Scripted(2), resume=True, fingerprint={"seed": 0, "deep": {"rate": 0.1, "names": ["a"], "new": 5}})


def test_lost_exactness_is_said(run: Any) -> None:
    run(Scripted(2))
    messages = run(Scripted(2), resume=True, exactness={"threads": 4})
    assert messages[0] == "scripted: resumed, but no longer bit for bit as without a stop: threads was 1, is 4"


def test_no_updates(tmp_path: Path, run: Any) -> None:
    training = Scripted(0)
    run(training)
    assert (training.ran, training.after) == ([], [0])
    assert lines(tmp_path) == []
