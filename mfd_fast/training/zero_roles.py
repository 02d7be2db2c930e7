"""What the trainer needs of roles that are shared out: the roles, an optimiser and an average, each as for whole ones.

State is saved tensor by tensor in the names and shapes of `mfd_fast.training.optimizing.RoleOptimizer`: a checkpoint
says nothing of processes or stages.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.config import DistillSettings, OptimizerSettings
from mfd_fast.training.context import Context
from mfd_fast.training.ema import WeightAverage
from mfd_fast.training.optimizing import UpdateReport, learning_rate, set_learning_rate
from mfd_fast.training.roles import TRAINED, Roles, UnlikeRoles
from mfd_fast.training.zero import GROWTH_INTERVAL, STATES, Sharded


class ZeroRoles:
    """Auxiliary and student as sharded copies of the teacher; see `mfd_fast.training.roles.Roles`.

    ``auxiliary``, ``student`` and ``parameters`` are the modules of the rollouts, in the precision of the engines.

    Args:
        teacher: the frozen teacher, the same in every process.
        trained: the roles to make; the field of one that is not is the teacher itself.
        settings: of the distillation: stage, offload, precision, batch and optimisers.
        context: device and processes.
        student: what the student begins as, if not as the teacher.

    Raises:
        ModuleNotFoundError: DeepSpeed is not installed.
    """

    def __init__(
        self,
        teacher: nn.Module,
        trained: Sequence[str],
        settings: DistillSettings,
        context: Context,
        *,
        student: nn.Module | None = None,
    ) -> None:
        start = {"auxiliary": teacher, "student": teacher if student is None else student}
        optimizers = {"auxiliary": settings.auxiliary_optimizer, "student": settings.student_optimizer}
        self.teacher = teacher
        self.sharded = {role: Sharded(start[role], settings, optimizers[role], context) for role in trained}
        """By role its engine and the module of its rollouts."""
        self.auxiliary, self.student = (
            self.sharded[role].rollout if role in self.sharded else teacher for role in TRAINED
        )

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The weights of a role as rollouts see them."""
        return list(self._of(role).rollout.parameters())

    def state_dict(self, role: str) -> dict[str, Tensor]:
        """The float32 weights and the buffers of a role by name, whole in the main process and empty in the others.

        All processes call it together.
        """
        sharded = self._of(role)
        weights = dict(zip(map(id, sharded.rollout.parameters()), sharded.gathered(), strict=True))
        state: dict[str, Tensor] = sharded.rollout.state_dict(keep_vars=True)
        return {name: weights.get(id(value), value.detach()) for name, value in state.items()}

    def load_state_dict(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Copy whole weights and buffers in, in all processes together; ValueError when names or shapes differ."""
        sharded = self._of(role)
        own: dict[str, Tensor] = sharded.rollout.state_dict(keep_vars=True)
        wrong = sorted(own.keys() ^ state.keys()) + [
            f"{name} {tuple(state[name].shape)} in place of {tuple(own[name].shape)}"
            for name in own.keys() & state.keys()
            if state[name].shape != own[name].shape
        ]
        if wrong:
            raise ValueError(f"the weights do not fit role {role!r}: {', '.join(wrong[:5])}")
        weights = {id(own[name]): value for name, value in state.items()}
        sharded.put([weights[id(parameter)] for parameter in sharded.rollout.parameters()])
        for buffer in sharded.rollout.buffers():
            if id(buffer) in weights:
                buffer.copy_(weights[id(buffer)])

    def _of(self, role: str) -> Sharded:
        if role not in self.sharded:
            raise ValueError(f"role must be one of {', '.join(self.sharded)}, got {role!r}")
        return self.sharded[role]


def sharded_roles(roles: Roles) -> dict[str, Sharded]:
    """The roles that are shared out, by name; the others, if there are any, each process holds whole."""
    if isinstance(roles, UnlikeRoles):
        return {role: part for one in roles.parts.values() for role, part in sharded_roles(one).items()}
    return roles.sharded if isinstance(roles, ZeroRoles) else {}


class ZeroOptimizer:
    """What `mfd_fast.training.optimizing.RoleOptimizer` is for whole roles, for a sharded one.

    DeepSpeed averages, unscales and clips the gradient, and skips the update where it is not finite.
    """

    def __init__(self, sharded: Sharded, settings: OptimizerSettings, *, total_updates: int) -> None:
        self._sharded, self._settings, self._total = sharded, settings, total_updates
        self._backwards = 0
        self.updates = 0
        scaler = self._engine.optimizer.loss_scaler
        self._scaler = scaler if getattr(scaler, "dynamic", False) else None
        if self._scaler is not None:
            # Too many skipped updates end a training elsewhere, with advice.
            self._scaler.raise_error_at_min_scale = False

    @property
    def _engine(self) -> Any:
        return self._sharded.engine

    def backward(self, loss: Tensor, accumulation: int, *, keep_graph: bool = False) -> None:
        """Add the gradient of one of ``accumulation`` parts of the batch, the number the engine was made for."""
        if self._backwards:
            self._engine.step()  # the end of a part before the last; DeepSpeed counts them
        self._backwards += 1
        seed = torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss.dtype)
        with self._sharded.at_work():
            self._engine.backward(loss * seed, retain_graph=keep_graph)

    def step(self) -> UpdateReport:
        """Apply the gradient and forget it. Non-finite gradients change no weight."""
        rate = learning_rate(self._settings, self.updates, self._total)
        for group in self._engine.optimizer.param_groups:
            set_learning_rate(group, rate)
        self._sharded.step()
        self._backwards = 0
        self.updates += 1
        skipped = bool(self._engine.optimizer.overflow)
        norm = math.inf if skipped else float(self._engine.get_global_grad_norm())
        return UpdateReport(torch.tensor(norm), rate, torch.tensor(skipped))

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state as named tensors ``INDEX.NAME``; whole in the main process, empty in the others."""
        steps = self._sharded.steps
        every = zip(*(self._sharded.gathered(name) for name in STATES), strict=True)
        named: dict[str, Tensor] = {}
        for index, values in enumerate(every):
            named[f"{index}.step"] = steps
            named |= {f"{index}.{name}": value for name, value in zip(STATES, values, strict=True)}
        return named

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, for JSON, in the words of torch.amp.GradScaler."""
        scale: dict[str, Any] = {}
        if self._scaler is not None:
            since = (self._scaler.cur_iter - self._scaler.last_overflow_iter - 1) % GROWTH_INTERVAL
            scale = {"scale": self._scaler.cur_scale, "growth_factor": 2.0, "backoff_factor": 0.5}
            scale |= {"growth_interval": GROWTH_INTERVAL, "_growth_tracker": since}
        return {"updates": self.updates, "loss_scale": scale, "kind": self._settings.name, "rest": {}}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from what `tensors` and `numbers` gave, of this class or of RoleOptimizer."""
        count = len(list(self._sharded.rollout.parameters()))
        if tensors:  # nothing before the first update
            for name in STATES:
                self._sharded.put([tensors[f"{index}.{name}"] for index in range(count)], name)
            self._sharded.steps = tensors["0.step"]
        self.updates = int(numbers["updates"])
        if self._scaler is not None:
            self._scaler.cur_scale = float(numbers["loss_scale"]["scale"])
            self._scaler.last_overflow_iter = -1
            self._scaler.cur_iter = int(numbers["loss_scale"]["_growth_tracker"])


class ZeroAverage(WeightAverage):
    """The average of a sharded role: each process averages its share of the float32 weights."""

    def __init__(self, sharded: Sharded, decay: float) -> None:
        super().__init__([nn.Parameter(part.detach(), requires_grad=False) for part in sharded.masters], decay)
        self._sharded = sharded

    def update(self, updates: int, skipped: Tensor | None = None) -> None:
        """As for whole weights; the shares may lie on the host."""
        super().update(updates, None if skipped is None else skipped.to(self._weights[0].device))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the role has the averaged weights; all processes enter and leave together."""
        with super().applied():
            self._sharded.recast()
            yield
        self._sharded.recast()

    def settle(self) -> None:
        """Give the role the averaged weights for good."""
        super().settle()
        self._sharded.recast()

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights, named by their position; whole in the main process, empty in the others."""
        with super().applied():
            return {str(index): value for index, value in enumerate(self._sharded.gathered())}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` gave, of this class or of WeightAverage."""
        kept = [weight.clone() for weight in self._weights]
        self._sharded.put([tensors[str(index)] for index in range(len(tensors))])
        torch._foreach_copy_(self._average, self._weights)
        torch._foreach_copy_(self._weights, kept)
        self._sharded.recast()
