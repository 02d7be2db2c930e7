"""One role in a DeepSpeed engine: weights, gradients and optimiser's states shared out among the processes by ZeRO.

Each trained role is one engine (arXiv 1910.02054: stage 1 shares out the optimiser's states, 2 the gradients too, 3 the
weights too); the teacher is outside. Engines compute the updates. Rollouts and the student's samples run on a second
module of the same structure that no hook knows, so runners, compiled copies and graphs stay valid: in stages 1 and 2 it
is the engine's own memory, in stage 3 a replica that `Sharded.refresh` fills when it is used and was left behind.

This is the only module that imports DeepSpeed, and only when a role is made. What the trainer sees is in
`mfd_fast.training.zero_roles`.
"""

import atexit
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from mfd_fast.config import DistillSettings, OptimizerSettings
from mfd_fast.module_copies import copied_module, shared_copy
from mfd_fast.training.context import Context
from mfd_fast.training.distributed import everybody_there, leave_world, of_a_message
from mfd_fast.training.optimizing import PRECISIONS, make_optimizer
from mfd_fast.types import VelocityField

BUCKET = 50_000_000
"""Elements of one message; DeepSpeed's own choice of 500 million would need 1 GB for each."""
GROUP = 200_000_000
"""Weights of a group of the optimiser. DeepSpeed makes the float32 gradients of one group at a time, which for all
weights would take 3.8 GiB more of each of two GPUs (SANA 1.6B); but a tensor of two shares is kept whole by both, so
smaller groups are shared out worse."""
GROWTH_INTERVAL = 2000
"""Updates without overflow after which the loss scale doubles, as in torch.amp.GradScaler."""
STATES = ("exp_avg", "exp_avg_sq")
"""What Adam keeps for each weight."""


class Sharded:
    """One network in a DeepSpeed engine, and the module that rollouts use.

    Float32 weights and the optimiser's states lie in flat parts, one share in each process; `gathered` and `put` move
    whole tensors, one at a time.
    """

    def __init__(
        self, start: nn.Module, settings: DistillSettings, optimizer: OptimizerSettings, context: Context
    ) -> None:
        deepspeed = import_deepspeed(context)
        self._zero: Any = deepspeed
        self._world, self._stage = context.world, settings.zero_stage
        dtype = PRECISIONS[settings.precision]
        network = copied_module(start, {}).requires_grad_(True)
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype or torch.float32)
        self.rollout = shared_copy(network).requires_grad_(True)
        """The network without hooks."""
        self._parameters = list(network.parameters())
        sizes = [parameter.numel() for parameter in self._parameters]
        self._gathered_at_once = _chunks(sizes, BUCKET)
        with peers_in_words(), _linear_is(functional.linear):
            self._engine, *_ = deepspeed.initialize(
                model=_Cast(network, dtype, context.device.type),
                optimizer=_grouped(self._parameters, sizes, optimizer),
                config=engine_config(settings, optimizer, context),
                dist_init_required=False,
            )
            self._linear = functional.linear
        # The engine has cast the buffers too; and in stages 1 and 2 it has moved the weights.
        for ours, theirs in zip(network.modules(), self.rollout.modules(), strict=True):
            ours._buffers.update(theirs._buffers)
        if self._stage < 3:
            for parameter, copied in zip(self._parameters, self.rollout.parameters(), strict=True):
                copied.data = parameter.data
        self._make_states()
        self._stale = False
        if any(value.dtype != dtype for value in start.parameters()):  # what rounding to the engine's type has lost
            self.put([value.detach().float() for value in start.parameters()])

    def _make_states(self) -> None:
        """Adam's states before its first step, as torch makes them in it: so they can be read and set at once."""
        for part in self.masters:
            state = self._inner.state[part]
            state["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
            state |= {name: torch.zeros_like(part) for name in STATES}
        if self._stage < 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine."""
        return self._engine

    @property
    def masters(self) -> list[Tensor]:
        """This process's share of the float32 weights, flat."""
        optimizer = self._engine.optimizer
        parts: list[Tensor] = (
            optimizer.single_partition_of_fp32_groups if self._stage < 3 else optimizer.fp32_partitioned_groups_flat
        )
        return parts

    @property
    def steps(self) -> Tensor:
        """Adam's number of steps, a scalar."""
        step: Tensor = self._inner.state[self.masters[0]]["step"]
        return step.detach().cpu().clone()

    @steps.setter
    def steps(self, value: Tensor) -> None:
        for part in self.masters:
            self._inner.state[part]["step"].copy_(value)

    @property
    def _inner(self) -> Any:
        return self._engine.optimizer.optimizer

    def gathered(self, state: str | None = None, *, everywhere: bool = False) -> Iterator[Tensor]:
        """The whole float32 weights, or an optimiser's state, on the host of the main process, one after the other.

        All processes iterate together; those that keep nothing get empty tensors, unless ``everywhere``.
        """
        utils = self._zero.utils
        for parameter in self._parameters:
            with everybody_there():
                whole = (
                    utils.safe_get_full_fp32_param(parameter)
                    if state is None
                    else utils.safe_get_full_optimizer_state(parameter, state)
                )
            yield whole.detach().cpu() if self._world.is_main or everywhere else torch.empty(0)

    def put(self, values: Sequence[Tensor], state: str | None = None) -> None:
        """Set the float32 weights, with every copy of them, or an optimiser's state from whole tensors."""
        utils = self._zero.utils
        for parameter, value in zip(self._parameters, values, strict=True):
            if self._stage == 3:
                own = self._own_share(parameter, value.float())
                if state is None:
                    utils.safe_set_local_fp32_param(parameter, own)
                else:
                    utils.safe_set_local_optimizer_state(parameter, own, state)
            elif state is None:
                utils.safe_set_full_fp32_param(parameter, value.float())
            else:
                utils.safe_set_full_optimizer_state(parameter, value.float(), state)
        if state is None:
            self.recast()

    def _own_share(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """What stage 3 keeps of ``value`` in this process, flat, with zeros behind its end.

        DeepSpeed's setters of whole tensors fail where the processes do not divide a tensor evenly.
        """
        length: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = functional.pad(value.flatten(), (0, length * self._world.size - value.numel()))
        return padded[self._world.rank * length :][:length]

    @torch.no_grad()
    def recast(self) -> None:
        """Make the weights of engine and rollouts from the float32 ones; DeepSpeed's setters leave them behind."""
        whole = self.gathered(everywhere=True)
        for parameter, copied, value in zip(self._parameters, self.rollout.parameters(), whole, strict=True):
            if self._stage == 3:
                with everybody_there(), self._zero.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(value)
            copied.data.copy_(value)
        self._stale = False

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the module of the rollouts up to date; nothing to do in stages 1 and 2."""
        if self._stage < 3 or not self._stale:
            return
        copies = list(self.rollout.parameters())
        for chunk in self._gathered_at_once:
            with everybody_there(), self._zero.zero.GatheredParameters(self._parameters[chunk]):
                for parameter, copied in zip(self._parameters[chunk], copies[chunk], strict=True):
                    copied.data.copy_(parameter.data)
        self._stale = False

    def field(self) -> VelocityField:
        """The network as the updates compute it."""

        def velocity(x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
            with self.at_work():
                result: Tensor = self._engine(x, t, **condition)
            return result

        return velocity

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, the engine may compute: in stage 3 with a `linear` that keeps no gathered weights for backward."""
        with peers_in_words(), _linear_is(self._linear):
            yield

    def step(self) -> None:
        """Let the engine do its update."""
        with peers_in_words():
            self._engine.step()
        self._stale = True


class _Cast(nn.Module):
    """A network under autocast, inside of the engine, which would switch it off; times and states stay float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype | None, device: str) -> None:
        super().__init__()
        self.network, self._dtype, self._device = network, dtype, device

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The velocity of the network."""
        with torch.autocast(self._device, dtype=self._dtype, enabled=self._dtype is not None):
            velocity: Tensor = self.network(x, t, **condition)
        return velocity


def engine_config(settings: DistillSettings, optimizer: OptimizerSettings, context: Context) -> dict[str, Any]:
    """DeepSpeed's configuration of a role."""
    share = context.shares(settings.batch_size, settings.accumulation)[0]
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "overlap_comm": context.device.type == "cuda",
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": 2 * BUCKET,
        "stage3_max_reuse_distance": BUCKET,
    }
    if settings.zero_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": context.device.type == "cuda"}
    config: dict[str, Any] = {
        "train_batch_size": share.total,
        "train_micro_batch_size_per_gpu": share.rows,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": optimizer.clip_norm or 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if settings.precision == "bfloat16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if settings.precision == "float16":
        scale = {"initial_scale_power": 16, "loss_scale_window": GROWTH_INTERVAL, "hysteresis": 1}
        config["fp16"] = {"enabled": True, "auto_cast": False, **scale}
    return config


def import_deepspeed(context: Context) -> Any:
    """DeepSpeed, quiet, with a process group to use; a run of one process gets a group of one.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", context.device.type)
    # The number of the GPU to DeepSpeed, which moves the process there: not 0 in a run of one process on cuda:1.
    os.environ.setdefault("LOCAL_RANK", str(context.world.local_rank))
    if context.device.index is not None:
        os.environ["LOCAL_RANK"] = str(context.device.index)
    try:
        import deepspeed
        from deepspeed.utils import groups, logger
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "distill.zero_stage needs DeepSpeed: pip install 'mfd_fast[zero]', or leave zero_stage at 0"
        ) from error
    # DeepSpeed calls functions of torch by their former names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On CPUs it would compile a reduction through shared memory, in which processes wait for ever for a dead one.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)  # skipped updates are told by the training, once
    if not dist.is_initialized():
        backend = "nccl" if context.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    # DeepSpeed's own would wait as long as torch does by default, and outlive the world it was made in.
    groups._WORLD_GROUP = _group_of_engines(dist.group.WORLD, context.world.patience_seconds)
    # A group that is still there when the interpreter ends can abort it (seen with stage 3).
    atexit.register(leave_world)
    return deepspeed


@lru_cache(maxsize=1)
def _group_of_engines(world: object, patience_seconds: float) -> Any:
    """The group in which the engines of all roles exchange messages, one for each world that is joined."""
    return dist.new_group(timeout=timedelta(seconds=patience_seconds))


@contextmanager
def peers_in_words() -> Iterator[None]:
    """Errors of messages inside say that a process is gone; others, such as of memory, stay as they are."""
    try:
        yield
    except RuntimeError as error:
        if not of_a_message(error):
            raise
        with everybody_there():
            raise


@contextmanager
def _linear_is(function: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, linear layers call ``function``. Stage 3 would replace torch's for good and for every network of the
    process: teacher and rollouts too would go through a Python function that autograd knows nothing of.
    """
    before = functional.linear
    setattr(functional, "linear", function)  # noqa: B010  (mypy: a function is no variable)
    try:
        yield
    finally:
        setattr(functional, "linear", before)  # noqa: B010


def _grouped(parameters: Sequence[nn.Parameter], sizes: Sequence[int], settings: OptimizerSettings) -> Any:
    """An optimiser with groups of about `GROUP` weights."""
    first, *others = (parameters[chunk] for chunk in _chunks(sizes, GROUP))
    optimizer = make_optimizer(first, settings)[0]
    for group in others:
        optimizer.add_param_group({"params": group})
    return optimizer


def _chunks(sizes: Sequence[int], limit: int) -> list[slice]:
    """Neighbours with at most ``limit`` elements together, if not one alone has more."""
    starts, filled = [0], 0
    for index, size in enumerate(sizes):
        if filled and filled + size > limit:
            starts.append(index)
            filled = 0
        filled += size
    return [slice(first, end) for first, end in zip(starts, [*starts[1:], len(sizes)], strict=True)]
