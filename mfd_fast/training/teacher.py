"""Training of a flow-matching teacher on a data set."""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.config import Settings, TeacherSettings, TimeSettings
from mfd_fast.data.dataset import Dataset
from mfd_fast.fields import autocast
from mfd_fast.intervals import TimeLaw, make_law
from mfd_fast.methods.mfd import flow_matching_loss
from mfd_fast.models import describe_model, null_condition
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.path import expand_times
from mfd_fast.run_folder import RunFolder, build_from_settings
from mfd_fast.settings_io import lasting_settings
from mfd_fast.streams import EpochOrder, RowDraws, Share, derive_seed, kept_random_state, make_generator
from mfd_fast.training.checkpoint import Checkpoint
from mfd_fast.training.context import Context
from mfd_fast.training.culprit import Culprit, find_culprit
from mfd_fast.training.ema import WeightAverage
from mfd_fast.training.loop import LoopOptions, Resume, Update, run_training
from mfd_fast.training.optimizing import PRECISIONS, RoleOptimizer
from mfd_fast.types import Rows


def law_from(settings: TimeSettings) -> TimeLaw:
    """The law that settings describe."""
    return make_law(
        settings.law,
        mean=settings.mean,
        std=settings.std,
        shift=settings.shift,
        low=settings.low,
        high=settings.high,
    )


class TeacherTraining:
    """Flow matching: ``E |field(x_t, t, condition) - (noise - data)|^2``.

    A share of the samples gets the network's null condition (no label, no history) in place of its own.
    """

    title = "teacher"

    def __init__(
        self, network: VelocityNetwork, dataset: Dataset, settings: TeacherSettings, seed: int, context: Context
    ) -> None:
        self.total_updates = settings.updates
        self._settings, self._dataset, self._seed, self._context = settings, dataset, seed, context
        self._network = network
        self._rows: dict[str, Rows] = dict(dataset.conditions)
        if dataset.label is not None:
            self._rows["label"] = dataset.label
        self._null = null_condition(network)
        self._field = autocast(network, PRECISIONS[settings.precision])
        self._law = law_from(settings.times)
        self._shares = context.shares(settings.batch_size, 1)
        self._order = EpochOrder(len(dataset.x), seed, "teacher/order")
        parameters = list(network.parameters())
        self._optimizer = RoleOptimizer(
            parameters,
            settings.optimizer,
            total_updates=settings.updates,
            precision=settings.precision,
            world=context.world,
        )
        self.average = WeightAverage(parameters, settings.ema_decay)

    def run_update(self, update: int) -> Update:
        """One flow-matching update."""
        (share,) = self._shares
        loss, _ = self._loss(update, share)
        self._optimizer.backward(loss, 1)
        report = self._optimizer.step()
        self.average.update(self._optimizer.updates, report.skipped)
        return Update("teacher", report, loss, {})

    def _loss(self, update: int, share: Share) -> tuple[Tensor, RowDraws]:
        draws = RowDraws(make_generator(self._seed, "teacher", update), share, self._context.device)
        index = self._order.indices(update * share.total + share.first, share.rows)
        data = self._dataset.x[index].to(self._context.device, non_blocking=True)
        condition = self._condition(index, draws)
        noise, t = draws.normal(self._dataset.sample_shape), draws.times(self._law).to(data.device, non_blocking=True)
        return flow_matching_loss(self._field, data, noise, t, condition), draws

    def find_culprit(self, update: int) -> Culprit:
        """The first sample of this process's share whose loss or gradient is not finite."""
        return find_culprit(self._shares, list(self._network.named_parameters()), partial(self._loss, update))

    def _condition(self, index: Tensor, draws: RowDraws) -> dict[str, Tensor]:
        device = self._context.device
        condition = {name: rows[index].to(device, non_blocking=True) for name, rows in self._rows.items()}
        if not condition or self._null is None:
            return condition
        dropped = draws.uniform() < self._settings.condition_dropout
        replaced = {
            name: torch.where(expand_times(dropped, condition[name]), self._null[name], condition[name])
            for name in self._null
        }
        return condition | replaced

    def log_due(self, update: int) -> bool:
        """Every ``log_every`` updates, and the last."""
        return update % self._settings.log_every == 0 or update + 1 == self.total_updates

    def checkpoint_due(self, done: int) -> bool:
        """Every ``checkpoint_every`` updates."""
        return self._settings.checkpoint_every > 0 and done % self._settings.checkpoint_every == 0

    def after_update(self, done: int) -> None:
        """Nothing to add."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Weights, their average and the optimiser's state."""
        return {
            "teacher": dict(self._network.state_dict()),
            "teacher_average": self.average.tensors(),
            "optimizer_teacher": self._optimizer.tensors(),
        }

    def numbers(self) -> dict[str, Any]:
        """The optimiser's counters."""
        return {"teacher": self._optimizer.numbers()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint; ValueError names what it lacks."""
        checkpoint.require(self.tensors())
        self._network.load_state_dict(checkpoint.tensors["teacher"])
        self.average.load(checkpoint.tensors["teacher_average"])
        self._optimizer.load(checkpoint.tensors["optimizer_teacher"], checkpoint.state["training"]["teacher"])


def train_teacher(
    settings: Settings, dataset: Dataset, run: RunFolder, context: Context, *, resume: Resume = False
) -> nn.Module:
    """Train a teacher as the settings say; its averaged weights end in ``teacher.safetensors``.

    Raises:
        mfd_fast.training.interrupts.Interrupted: a signal came; ``resume=True`` continues.
    """
    with kept_random_state():
        torch.manual_seed(derive_seed(settings.run.seed, "teacher/init", 0))
        network = build_from_settings(settings, dataset.sample_shape, dataset.num_classes)
    network.to(context.device)
    training = TeacherTraining(network, dataset, settings.teacher, settings.run.seed, context)
    options = LoopOptions(
        log=run.path / "teacher_log.jsonl",
        checkpoints=run.teacher_checkpoints(),
        tensorboard=run.path / "tensorboard" / "teacher" if settings.run.tensorboard else None,
        keep=1,
        seed=settings.run.seed,
        max_skipped=settings.distill.max_skipped_updates,
        exactness=context.exactness(),
        fingerprint={
            "model": asdict(settings.model),
            "data": {"name": settings.data.name, "options": settings.data.options},
            "teacher": lasting_settings(settings.teacher),
            "seed": settings.run.seed,
        },
        resume=resume,
        deadline=context.deadline,
    )
    run_training(training, options, context.world)
    with training.average.applied():
        if context.world.is_main:
            run.write_network("teacher", dict(network.state_dict()), describe_model(network))
        weights = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(weights)
    context.world.barrier()
    return network.requires_grad_(False).eval()
