"""Data parallel training under torchrun: every process computes its share of each batch, gradients are averaged."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    patience_seconds: float = 600.0
    """How long processes wait for each other."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes, in one message."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.size == 1 or not gradients:
            return
        flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        with everybody_there():
            dist.all_reduce(flat)
        flat /= self.size
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over the processes; NaN entries (nothing measured there) do not count."""
        if self.size == 1:
            return values
        pair = torch.stack([values.nan_to_num(nan=0.0), (~values.isnan()).to(values)]).to(self._device())
        with everybody_there():
            dist.all_reduce(pair)
        return (pair[0] / pair[1]).to(values.device)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the processes."""
        if self.size == 1:
            return values
        total = values.detach().clone().to(self._device())
        with everybody_there():
            dist.all_reduce(total)
        return total.to(values.device)

    def any(self, flag: bool) -> bool:
        """Whether the flag is raised in any process."""
        if self.size == 1:
            return flag
        raised = torch.tensor([float(flag)], device=self._device())
        with everybody_there():
            dist.all_reduce(raised)
        return bool(raised.item() > 0)

    def smallest(self, value: float) -> float:
        """The smallest ``value`` of all processes."""
        if self.size == 1:
            return value
        values = torch.tensor([value], dtype=torch.float64, device=self._device())
        with everybody_there():
            dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return float(values.item())

    def same(self, value: float) -> bool:
        """Whether ``value`` is the same in all processes."""
        return self.smallest(value) == -self.smallest(-value)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give all processes the main process's values."""
        if self.size > 1:
            for tensor in tensors:
                message = tensor.contiguous()
                with everybody_there():
                    dist.broadcast(message, src=0)
                tensor.copy_(message)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            with everybody_there():
                dist.barrier(device_ids=[torch.cuda.current_device()] if _by_nccl() else None)

    def _device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if _by_nccl() else torch.device("cpu")


def _by_nccl() -> bool:
    """Whether messages go from GPU to GPU, the current ones of the processes."""
    return dist.get_backend() == "nccl"


@contextmanager
def everybody_there() -> Iterator[None]:
    """Say in words what a message that fails means."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"another process of this run is gone, or did not answer within run.patience_seconds; what was saved "
            f"stands, start all of them again, a training with --resume auto ({error})"
        ) from error


def of_a_message(error: RuntimeError) -> bool:
    """Whether an error that came out of other work is that of a message between processes."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def join_world(device: str, patience_seconds: float = 600.0) -> World:
    """The world that torchrun describes in the environment, or a world of one process.

    Args:
        device: "cpu" or "cuda"; chooses gloo or nccl, which goes through the current device: set it before.
        patience_seconds: how long processes wait for each other before they give up.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")), patience_seconds)
    if not dist.is_initialized():
        patience = timedelta(seconds=patience_seconds)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=patience)
    return world


def is_first_process() -> bool:
    """Whether this is the process that speaks, also before it has joined the others and after it has left them."""
    return os.environ.get("RANK", "0") == "0"


def leave_world() -> None:
    """End the process group if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
