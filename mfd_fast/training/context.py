"""Where a run computes and who else computes with it."""

import os
import time
from dataclasses import dataclass

import torch

from mfd_fast.config import RunSettings
from mfd_fast.streams import Share
from mfd_fast.training.distributed import World, join_world


@dataclass(frozen=True)
class Context:
    """Device and processes of a run."""

    device: torch.device
    world: World
    deadline: float | None = None
    """`time.monotonic` at which trainings save and stop."""

    def shares(self, batch_size: int, accumulation: int) -> list[Share]:
        """This process's parts of every batch, one for each backward pass.

        Raises:
            ValueError: the batch cannot be split evenly.
        """
        parts = self.world.size * accumulation
        if batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of processes x accumulation = {self.world.size} x {accumulation}, "
                f"got {batch_size}"
            )
        rows = batch_size // parts
        return [Share(batch_size, (self.world.rank * accumulation + part) * rows, rows) for part in range(accumulation)]

    def exactness(self) -> dict[str, object]:
        """What must stay equal for a resume to give the same bits."""
        return {
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "processes": self.world.size,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "torch": torch.__version__,
        }


def choose_device(name: str, argument: str) -> torch.device:
    """The device called ``name``: cpu, cuda, cuda:N, or auto for CUDA where there is some.

    Raises:
        ValueError: there is no such device; the message names ``argument``.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{argument} must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{argument} is {name!r}, but torch sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{argument} is {name!r}, but torch sees {torch.cuda.device_count()} CUDA device(s)")
    return device


def make_context(settings: RunSettings) -> Context:
    """Choose the device, set the number of threads, join the other processes of torchrun.

    Raises:
        ValueError: the device is not there.
    """
    deadline = None if settings.max_seconds is None else time.monotonic() + settings.max_seconds
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.deterministic:
        use_deterministic_algorithms()
    device = choose_device(settings.device, "run.device")
    if device.type == "cuda":  # pragma: no cover (gpu)
        device = gpu_of_process(device)
        # Before the processes meet: the messages of NCCL go through the current device.
        torch.cuda.set_device(device)
    world = join_world(device.type, settings.patience_seconds)
    return Context(device, world, deadline)


def gpu_of_process(device: torch.device) -> torch.device:
    """The GPU that was asked for, or the one with the number of this process among those that torchrun started here.

    Raises:
        ValueError: there is none, or several processes would share one.
    """
    if device.index is None:
        return choose_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}", "run.device of this process")
    # As torchrun says it, or DeepSpeed's launcher.
    if (processes := int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1"))) > 1:
        raise ValueError(f"run.device must be cuda where {processes} processes run on one machine, got '{device}'")
    return device


def use_deterministic_algorithms() -> None:
    """Let this process use only algorithms that repeat themselves bit for bit; others raise RuntimeError.

    Call it before CUDA is first used: cuBLAS reads its workspace setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # That would fill all new memory, a safeguard against reading what nobody wrote that costs time everywhere.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  (mypy knows no such name)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
