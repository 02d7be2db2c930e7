"""The loop that every training shares: order of updates, logs, checkpoints, resume, signals, non-finite updates."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from mfd_fast.methods.base import ROOTS
from mfd_fast.run_folder import versions
from mfd_fast.storage import only_writer, sha256
from mfd_fast.streams import derive_seed, kept_random_state
from mfd_fast.training.checkpoint import MANIFEST, Checkpoint, latest_checkpoint, save_checkpoint
from mfd_fast.training.culprit import Culprit
from mfd_fast.training.distributed import World
from mfd_fast.training.interrupts import Interrupted, StopRequest, stop_on_signals
from mfd_fast.training.monitor import Monitor, Value
from mfd_fast.training.optimizing import UpdateReport
from mfd_fast.training.scores import best_kept
from mfd_fast.training.skips import Skips
from mfd_fast.training.unread import UnreadFlags

Resume = bool | Literal["auto"]
"""False starts, True goes on from a checkpoint that must be there, "auto" goes on if there is one and else starts."""


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

    def find_culprit(self, update: int) -> Culprit:
        """What made update number ``update``, which was skipped just now, non-finite in this process's share."""
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
        """All state that is tensors, by group; called by all processes together, what the main process gets counts."""
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
    resume: Resume
    deadline: float | None = None
    """`time.monotonic` at which to save and stop."""


def run_training(training: Training, options: LoopOptions, world: World) -> list[str]:
    """Run all updates of ``training``; returns messages about the resume.

    Raises:
        Interrupted: a signal came or the time is up; the state is saved.
        FloatingPointError: too many non-finite updates in a row; the last checkpoint before them stands.
        OSError: a checkpoint could not be written; the ones before it stand.
        RuntimeError: another run is at work in this folder, or a process of this one is gone.
        ValueError: the checkpoint to resume belongs to other settings, or there is none, or the processes see others.
    """
    with only_writer(options.log.parent, enabled=world.is_main):
        return _run_alone(training, options, world)


def _run_alone(training: Training, options: LoopOptions, world: World) -> list[str]:
    done, seconds, skipped, messages = _resume(training, options, world) if options.resume else (0, 0.0, 0, [])
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
    with monitor, kept_random_state(), stop_on_signals(options.deadline) as stop:
        if done == 0:
            training.after_update(0)
        skips = Skips(training.title, skipped, options.max_skipped, world, monitor)
        _run(training, options, world, monitor, stop, done, skips)
    return messages


def _run(
    training: Training, options: LoopOptions, world: World, monitor: Monitor, stop: StopRequest, done: int, skips: Skips
) -> None:
    unread, unusual = UnreadFlags(), _not_finite(training.tensors())
    for update in range(done, training.total_updates):
        # Dropout and user code draw from the global generator; keyed by the update it needs no saving.
        torch.manual_seed(derive_seed(options.seed, f"global/{world.rank}", update))
        result = training.run_update(update)
        # On a GPU the flag is read some updates later, and the culprit is looked for with the weights of then.
        find = partial(training.find_culprit, update)
        unread.add(result.report.skipped, partial(skips.note, update, result.role, find))
        shown: dict[str, float] = {}
        if training.log_due(update):
            unread.read()
            values = _log_line(result, skips.total, world)
            monitor.log(update + 1, values)
            shown = {f"{result.role} loss": float(result.loss.detach())}
        monitor.advance(update + 1, shown)
        training.after_update(update + 1)
        stopping = world.any(bool(stop) or monitor.unheard)
        finished = update + 1 == training.total_updates
        if finished or stopping or training.checkpoint_due(update + 1):
            unread.read()
            _save(training, options, world, monitor, update + 1, skips.total, unusual)
        if stopping and not finished:
            raise Interrupted(
                stop.signal_number,
                f"{training.title} stopped after {update + 1} of {training.total_updates} updates"
                f"{_reason(stop, monitor)}; "
                f"it is saved in {options.checkpoints}",
            )


def _reason(stop: StopRequest, monitor: Monitor) -> str:
    """Why a training stops that nobody has sent a signal; those who send one know."""
    if stop.signal_number is None and monitor.unheard:
        return ", nobody reads its output any more"
    return ", the time limit is reached" if stop.signal_number is None and stop.out_of_time else ""


def _log_line(result: Update, skipped: int, world: World) -> dict[str, Value]:
    measured = {"loss": result.loss.detach().reshape(1), **{k: v.detach().reshape(-1) for k, v in result.logs.items()}}
    wide = {name: value.to("cpu", torch.float64) for name, value in measured.items()}
    flat = world.mean(torch.cat([value.square() if name in ROOTS else value for name, value in wide.items()]))
    values: dict[str, Value] = {"role": result.role}
    for name, part in zip(wide, torch.split(flat, [value.numel() for value in wide.values()]), strict=True):
        mean = part.sqrt() if name in ROOTS else part
        values[name] = mean.tolist() if len(mean) > 1 else mean.item()
    report = result.report
    return values | {"grad_norm": float(report.grad_norm), "learning_rate": report.learning_rate, "skipped": skipped}


def _save(
    training: Training,
    options: LoopOptions,
    world: World,
    monitor: Monitor,
    done: int,
    skipped: int,
    unusual: frozenset[str],
) -> None:
    """Save in the main process; what goes wrong there ends all processes."""
    failure: OSError | FloatingPointError | None = None
    tensors = training.tensors()  # where state is shared out, the processes put it together here
    if world.is_main:
        try:
            if new := sorted(_not_finite(tensors) - unusual):
                raise FloatingPointError(f"{training.title}: {new[0]} is not finite after {done} updates")
            state = {
                "done": done,
                "seconds": monitor.seconds,
                "skipped": skipped,
                "exactness": options.exactness,
                "fingerprint": options.fingerprint,
                "versions": versions(),
                "training": training.numbers(),
            }
            save_checkpoint(
                options.checkpoints, done, tensors, state, options.keep, spared=best_kept(options.checkpoints)
            )
        except (OSError, FloatingPointError) as error:
            failure = error
    if not world.any(failure is not None):
        return
    words = f"no checkpoint after {done} updates; those in {options.checkpoints} from before stand"
    if isinstance(failure, FloatingPointError):
        raise FloatingPointError(f"{failure}: {words}") from failure
    raise OSError(f"{failure or 'the main process could not save'}: {words}") from failure


def _not_finite(groups: Mapping[str, Mapping[str, Tensor]]) -> frozenset[str]:
    """``GROUP/NAME`` of all state with NaN or infinity. At the start that is a constant such as a mask."""
    return frozenset(
        f"{group}/{name}"
        for group, tensors in groups.items()
        for name, value in tensors.items()
        if not bool(value.isfinite().all())
    )


def _resume(training: Training, options: LoopOptions, world: World) -> tuple[int, float, int, list[str]]:
    checkpoint, messages = latest_checkpoint(options.checkpoints)
    if not world.same(_number_of(checkpoint)):
        found = "none" if checkpoint is None else checkpoint.path.name
        raise ValueError(
            f"{training.title}: processes found different checkpoints in {options.checkpoints} (process {world.rank}: "
            f"{found}): all must see the same run folder, on a file system that their machines share"
        )
    if checkpoint is None:
        nothing = f"{training.title}: nothing to resume in {options.checkpoints}"
        if options.resume != "auto":
            raise ValueError("; ".join([nothing, *messages, 'resume="auto" (--resume auto) starts in that case']))
        return 0, 0.0, 0, [*messages, f"{nothing}, starting anew"]
    state = checkpoint.state
    try:
        different = _differences(state["fingerprint"], options.fingerprint)
        changed = _differences(state["exactness"], options.exactness)
        done, seconds, skipped = int(state["done"]), float(state["seconds"]), int(state["skipped"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint.path / 'state.json'} is not that of a training: {error!r}") from error
    if different:
        raise ValueError(f"{checkpoint.path} belongs to other settings and cannot be resumed: {'; '.join(different)}")
    if changed:
        messages.append(f"{training.title}: resumed, but no longer bit for bit as without a stop: {'; '.join(changed)}")
    try:
        training.load(checkpoint)
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{checkpoint.path} does not fit this training: {error!r}") from error
    messages.append(f"{training.title}: resumed after {done} updates from {checkpoint.path}")
    return done, seconds, skipped, messages


def _number_of(checkpoint: Checkpoint | None) -> float:
    """A number that tells a checkpoint from others by what it holds; 0 for none."""
    return 0.0 if checkpoint is None else float(1 + int(sha256(checkpoint.path / MANIFEST)[:12], 16))


def _differences(saved: Mapping[str, Any], present: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted(saved.keys() | present.keys()):
        before, now = saved.get(key), present.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found.append(f"{prefix}{key} was {before}, is {now}")
    return found
