from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfd_fast.closed_forms import Gaussian
from mfd_fast.config import Settings
from mfd_fast.data.dataset import Dataset
from mfd_fast.metrics import sliced_wasserstein
from mfd_fast.models import build_model
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.run_folder import RunFolder
from mfd_fast.student import Student
from mfd_fast.training import teacher as module
from mfd_fast.training.checkpoint import latest_checkpoint
from mfd_fast.training.context import Context, make_context
from mfd_fast.training.distributed import World
from mfd_fast.training.teacher import TeacherTraining, train_teacher

Make = Callable[..., Settings]


def labelled(rows: int = 20) -> Dataset:
    x = Gaussian(1.0, 0.5).sample(rows, torch.Generator().manual_seed(0), shape=(2,))
    label = torch.arange(rows) % 3
    return Dataset("points", x, label, x[:2], label[:2], 3)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What the loss of every update gets."""
    batches: list[dict[str, Tensor]] = []
    original = module.flow_matching_loss

    def note(field: Any, data: Tensor, noise: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        batches.append({"data": data, "noise": noise, "t": t, **condition})
        return original(field, data, noise, t, condition)

    monkeypatch.setattr(module, "flow_matching_loss", note)
    return batches


def start(settings: Settings, dataset: Dataset, world: World | None = None) -> TeacherTraining:
    network = build_model("mlp", dataset.sample_shape, dataset.num_classes, width=16, depth=1)
    context = Context(torch.device("cpu"), world or World())
    return TeacherTraining(network, dataset, settings.teacher, 0, context)


def test_an_epoch_is_every_sample_once_with_its_label(tiny_settings: Make, seen: list[dict[str, Tensor]]) -> None:
    dataset = labelled(20)
    training = start(tiny_settings("teacher.batch_size=5", "teacher.condition_dropout=0.0"), dataset)
    for update in range(4):
        training.run_update(update)
    data, label = torch.cat([batch["data"] for batch in seen]), torch.cat([batch["label"] for batch in seen])
    order = torch.cdist(data, dataset.x).argmin(1)
    assert sorted(order.tolist()) == list(range(20))
    assert dataset.label is not None
    assert torch.equal(label, dataset.label[order])
    times = torch.cat([batch["t"] for batch in seen])
    assert len(times.unique()) == 20
    assert len(torch.cat([batch["noise"] for batch in seen]).unique()) == 40


def test_a_share_of_the_labels_is_dropped(tiny_settings: Make, seen: list[dict[str, Tensor]]) -> None:
    training = start(tiny_settings("teacher.batch_size=400", "teacher.condition_dropout=0.25"), labelled())
    training.run_update(0)
    assert (seen[0]["label"] == 3).float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert set(seen[0]["label"].tolist()) == {0, 1, 2, 3}


def test_processes_share_one_batch(tiny_settings: Make, seen: list[dict[str, Tensor]], monkeypatch: Any) -> None:
    settings = tiny_settings("teacher.batch_size=8")
    monkeypatch.setattr(World, "average_gradients", lambda self, parameters: None)
    for world in (World(), World(0, 2), World(1, 2)):
        start(settings, labelled(), world).run_update(3)
    whole, *parts = seen
    assert all(torch.equal(torch.cat([part[name] for part in parts]), value) for name, value in whole.items())


def test_unlabelled_data_trains_without_labels(tiny_settings: Make, seen: list[dict[str, Tensor]]) -> None:
    dataset = labelled()
    start(tiny_settings(), Dataset("points", dataset.x, None, dataset.held_out_x, None)).run_update(0)
    assert seen[0].keys() == {"data", "noise", "t"}


def test_the_finished_teacher_is_the_average_and_generates_the_data(tmp_path: Path, tiny_settings: Make) -> None:
    data = labelled(500)
    settings = tiny_settings(
        "teacher.updates=150", "teacher.batch_size=64", "teacher.optimizer.learning_rate=0.01", "teacher.ema_decay=0.9"
    )
    run = RunFolder(tmp_path / "run")
    network = train_teacher(settings, data, run, make_context(settings.run))
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    read = run.read_teacher()
    assert not read.training
    x, t, label = torch.randn(5, 2), torch.rand(5), torch.arange(5) % 4
    assert torch.equal(read(x, t, label), network(x, t, label))
    checkpoint, _ = latest_checkpoint(run.teacher_checkpoints())
    assert checkpoint is not None
    averages = [checkpoint.tensors["teacher_average"][str(index)] for index in range(len(list(network.parameters())))]
    assert all(torch.equal(weight, average) for weight, average in zip(network.parameters(), averages, strict=True))
    assert not torch.equal(checkpoint.tensors["teacher"]["leave.weight"], read.state_dict()["leave.weight"])
    generated = Student(network, (2,), steps=20, label_counts=(1, 1, 1)).sample(500)
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(generated, data.x) < 0.25 * sliced_wasserstein(noise, data.x)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_teacher(tmp_path: Path, tiny_settings: Make, precision: str) -> None:
    settings = tiny_settings(f"teacher.precision={precision}")
    network = train_teacher(settings, labelled(), RunFolder(tmp_path), make_context(settings.run))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert all(bool(parameter.isfinite().all()) for parameter in network.parameters())
    assert (tmp_path / "teacher_log.jsonl").read_text().count('"loss"') == 12


def test_a_teacher_that_diverges_is_given_up(tmp_path: Path, tiny_settings: Make) -> None:
    data = labelled()
    data.x[3] = float("nan")
    settings = tiny_settings("teacher.batch_size=20", "distill.max_skipped_updates=2")
    with pytest.raises(FloatingPointError, match="3 updates in a row"):
        train_teacher(settings, data, RunFolder(tmp_path), make_context(settings.run))
    assert not RunFolder(tmp_path).has_network("teacher")


class _Past(VelocityNetwork):
    """A network with a condition that is no label: half of it has a null value, half of it has none."""

    def __init__(self) -> None:
        super().__init__((2,), None, {})
        self.mix = nn.Linear(5, 2)

    def forward(self, x: Tensor, t: Tensor, past: Tensor, pace: Tensor) -> Tensor:
        out: Tensor = self.mix(torch.cat([x, past, pace[:, None]], 1))
        return out

    def null_condition(self) -> dict[str, Tensor]:
        return {"past": torch.full((1, 2), -9.0)}


def test_conditions_that_are_no_labels_travel_with_their_samples(
    tiny_settings: Make, seen: list[dict[str, Tensor]]
) -> None:
    x = torch.arange(40.0).view(20, 2)
    rows = {"past": x + 100, "pace": x[:, 0] + 7}
    held_out = {name: values[:2] for name, values in rows.items()}
    dataset = Dataset("pasts", x, None, x[:2], None, conditions=rows, held_out_conditions=held_out)
    settings = tiny_settings("teacher.batch_size=10", "teacher.condition_dropout=0.3")
    training = TeacherTraining(_Past(), dataset, settings.teacher, 0, Context(torch.device("cpu"), World()))
    for update in range(40):
        training.run_update(update)
    data, past, pace = (torch.cat([batch[name] for batch in seen]) for name in ("data", "past", "pace"))
    assert torch.equal(pace, data[:, 0] + 7)
    dropped = past[:, 0] == -9
    assert torch.equal(past[~dropped], data[~dropped] + 100)
    assert (past[dropped] == -9).all()
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.06)
