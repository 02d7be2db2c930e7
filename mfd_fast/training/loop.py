"""The loop that every training shares: order of updates, logs, checkpoints, resume, signals, non-finite updates."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mfd_fast.streams import derive_seed
from mfd_fast.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from mfd_fast.training.distributed import World
from mfd_fast.training.interrupts import Interrupted, StopRequest, stop_on_signals
from mfd_fast.training.monitor import Monitor, Value
from mfd_fast.training.optimizing import UpdateReport
from mfd_fast.training.unread import UnreadFlags


class Update(NamedTuple):
    """What one update gave."""

    role: str
    report: UpdateReport
    loss: Tensor
    """Scalar, the mean over this process's share."""
    logs: dict[str, Tensor]
    """Scalars or short vectors of this process's share."""


class Training(Protocol):
    """What the loop needs of a training."""

    title: str
    total_updates: int

    def run_update(self, update: int) -> Update:
        """Do update number ``update``; all randomness comes from the seed and this number."""
        ...

    def log_due(self, update: int) -> bool:
        """Whether a line is written for this update."""
        ...

    def checkpoint_due(self, done: int) -> bool:
        """Whether to save after ``done`` updates."""
        ...

    def after_update(self, done: int) -> None:
        """Anything else after ``done`` updates, such as sample grids; also called with 0 before the first."""
        ...

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All state that is tensors, by group."""
        ...

    def numbers(self) -> dict[str, Any]:
        """All other state, for JSON."""
        ...

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint."""
        ...


class LoopOptions(NamedTuple):
    """Where and how a loop runs."""

    log: Path
    checkpoints: Path
    tensorboard: Path | None
    keep: int
    seed: int
    max_skipped: int
    """Non-finite updates in a row after which the training gives up."""
    exactness: dict[str, Any]
    """What must be equal for a resumed run to give the same bits, such as the number of threads."""
    fingerprint: dict[str, Any]
    """Settings that may not differ on resume."""
    resume: bool


def run_training(training: Training, options: LoopOptions, world: World) -> list[str]:
    """Run all updates of ``training``; returns messages about the resume.

    Raises:
        Interrupted: a signal came; the state is saved.
        FloatingPointError: too many non-finite updates in a row; the last checkpoint before them stands.
        ValueError: the checkpoint to resume belongs to other settings.
    """
    done, seconds, skipped, messages = _resume(training, options) if options.resume else (0, 0.0, 0, [])
    if world.is_main:
        for message in messages:
            print(message, flush=True)
    monitor = Monitor(
        options.log,
        title=training.title,
        total=training.total_updates,
        start=done,
        seconds=seconds,
        tensorboard=options.tensorboard,
        enabled=world.is_main,
    )
    # The caller's random state is nobody else's business.
    with monitor, torch.random.fork_rng(), stop_on_signals() as stop:
        if done == 0:
            training.after_update(0)
        _run(training, options, world, monitor, stop, done, skipped)
    return messages


def _run(
    training: Training, options: LoopOptions, world: World, monitor: Monitor, stop: StopRequest, done: int, skipped: int
) -> None:
    unread, skips = UnreadFlags(), _Skips(training.title, options, world.is_main, skipped)
    for update in range(done, training.total_updates):
        # Dropout and user code draw from the global generator; keyed by the update it needs no saving.
        torch.manual_seed(derive_seed(options.seed, f"global/{world.rank}", update))
        result = training.run_update(update)
        unread.add(result.report.skipped, partial(skips.note, update, result.role))
        shown: dict[str, float] = {}
        if training.log_due(update):
            unread.read()
            values = _log_line(result, skips.total, world)
            monitor.log(update + 1, values)
            shown = {f"{result.role} loss": float(result.loss.detach())}
        monitor.advance(update + 1, shown)
        training.after_update(update + 1)
        stopping = world.any(bool(stop))
        finished = update + 1 == training.total_updates
        if finished or stopping or training.checkpoint_due(update + 1):
            unread.read()
            _save(training, options, world, monitor, update + 1, skips.total)
        if stopping and not finished:
            raise Interrupted(
                stop.signal_number or 15,
                f"{training.title} stopped after {update + 1} of {training.total_updates} updates; it is saved in "
                f"{options.checkpoints}",
            )


class _Skips:
    """Counts the updates that changed nothing."""

    def __init__(self, title: str, options: LoopOptions, speaks: bool, total: int) -> None:
        self.total, self._in_a_row = total, 0
        self._title, self._options, self._speaks = title, options, speaks

    def note(self, update: int, role: str, skipped: bool) -> None:
        """Take in update number ``update``; FloatingPointError when too many in a row were skipped."""
        self.total += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if skipped and self._speaks:
            print(f"{self._title}: update {update} of the {role} was skipped, its gradient is not finite")
        if self._in_a_row > self._options.max_skipped:
            raise FloatingPointError(
                f"{self._in_a_row} updates in a row had non-finite gradients (last: the {role} in update "
                f"{update}). Lower the learning rate, set clip_norm, or compute in float32; the checkpoints in "
                f"{self._options.checkpoints} are from before."
            )


def _log_line(result: Update, skipped: int, world: World) -> dict[str, Value]:
    measured = {"loss": result.loss.detach().reshape(1), **{k: v.detach().reshape(-1) for k, v in result.logs.items()}}
    flat = world.mean(torch.cat([value.to("cpu", torch.float64) for value in measured.values()]))
    parts = torch.split(flat, [value.numel() for value in measured.values()])
    values: dict[str, Value] = {"role": result.role}
    for (name, tensor), part in zip(measured.items(), parts, strict=True):
        values[name] = part.tolist() if tensor.numel() > 1 else part.item()
    report = result.report
    return values | {"grad_norm": float(report.grad_norm), "learning_rate": report.learning_rate, "skipped": skipped}


def _save(training: Training, options: LoopOptions, world: World, monitor: Monitor, done: int, skipped: int) -> None:
    if world.is_main:
        state = {
            "done": done,
            "seconds": monitor.seconds,
            "skipped": skipped,
            "exactness": options.exactness,
            "fingerprint": options.fingerprint,
            "training": training.numbers(),
        }
        save_checkpoint(options.checkpoints, done, training.tensors(), state, options.keep)
    world.barrier()


def _resume(training: Training, options: LoopOptions) -> tuple[int, float, int, list[str]]:
    checkpoint, messages = latest_checkpoint(options.checkpoints)
    if checkpoint is None:
        return 0, 0.0, 0, [*messages, f"{training.title}: nothing to resume in {options.checkpoints}, starting anew"]
    state = checkpoint.state
    different = _differences(state["fingerprint"], options.fingerprint)
    if different:
        raise ValueError(f"{checkpoint.path} belongs to other settings and cannot be resumed: {'; '.join(different)}")
    changed = _differences(state["exactness"], options.exactness)
    if changed:
        messages.append(f"{training.title}: resumed, but no longer bit for bit as without a stop: {'; '.join(changed)}")
    training.load(checkpoint)
    messages.append(f"{training.title}: resumed after {state['done']} updates from {checkpoint.path}")
    return state["done"], state["seconds"], state["skipped"], messages


def _differences(saved: Mapping[str, Any], present: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted(saved.keys() | present.keys()):
        before, now = saved.get(key), present.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found.append(f"{prefix}{key} was {before}, is {now}")
    return found
