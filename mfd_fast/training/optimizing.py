"""The optimiser of one role with everything around it: schedule, loss scale, averaging, clipping, skipped updates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfd_fast.config import OptimizerSettings
from mfd_fast.training.adam8bit import LIBRARIES, adam_options, flatten, make_adamw8bit, unflatten
from mfd_fast.training.distributed import World

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Setting to autocast dtype; None computes in float32."""


class UpdateReport(NamedTuple):
    """What an update did."""

    grad_norm: Tensor
    """Global norm of the averaged gradient before clipping, a scalar on the device."""
    learning_rate: float
    skipped: Tensor
    """Whether a non-finite gradient kept the weights as they were, a bool on the device."""


def learning_rate(settings: OptimizerSettings, update: int, total: int) -> float:
    """The learning rate of update number ``update`` (from 0) of ``total``: linear warm-up, then the schedule."""
    rate = settings.learning_rate
    if settings.schedule != "constant":
        progress = min(1.0, update / max(1, total))
        decay = 0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress
        rate *= settings.final_fraction + (1 - settings.final_fraction) * decay
    return rate * min(1.0, (update + 1) / settings.warmup_updates) if settings.warmup_updates else rate


class RoleOptimizer:
    """Updates the parameters of one role; counts the updates it has been asked for."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        settings: OptimizerSettings,
        *,
        total_updates: int,
        precision: str,
        world: World,
    ) -> None:
        self._parameters = list(parameters)
        self._settings = settings
        self._total = total_updates
        self._world = world
        device = self._parameters[0].device.type
        self._optimizer: Any
        self.kind: str
        """What updates the weights: adam, adamw or a library of `mfd_fast.training.adam8bit`."""
        self.note: str | None
        """A sentence for people where that is not what the settings ask for."""
        self._optimizer, self.kind, self.note = make_optimizer(self._parameters, settings)
        self._scaler = torch.amp.GradScaler(device, enabled=precision == "float16")
        self.updates = 0

    def backward(self, loss: Tensor, accumulation: int, *, keep_graph: bool = False) -> None:
        """Add the gradient of one of ``accumulation`` parts of the batch; weights of other roles get none.

        A loss that is not finite makes its gradient NaN in every process, so the update is skipped by all.
        """
        seed = torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss.dtype)
        scaled = self._scaler.scale(loss / accumulation)
        torch.autograd.backward(scaled, seed, retain_graph=keep_graph, inputs=self._parameters)

    def step(self) -> UpdateReport:
        """Average, unscale, clip and apply the gradient; forget it. Non-finite gradients change no weight.

        That is decided on the device: the host does not wait for the gradient.
        """
        rate = learning_rate(self._settings, self.updates, self._total)
        for group in self._optimizer.param_groups:
            set_learning_rate(group, rate)
        self._world.average_gradients(self._parameters)
        self._scaler.unscale_(self._optimizer)
        limit = self._settings.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, math.inf if limit is None else limit)
        skipped = ~norm.isfinite()
        if self.kind in LIBRARIES:
            # These know nothing of a skipped update: the host waits to decide it.
            if not bool(skipped):
                self._optimizer.step()
        else:
            self._step_unless(skipped)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return UpdateReport(norm, rate, skipped)

    def _step_unless(self, skipped: Tensor) -> None:
        # Where this is 1 the fused optimisers leave weights and state as they are (torch's protocol with GradScaler).
        self._optimizer.found_inf = skipped.float()
        self._optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state as named tensors ``INDEX.NAME``."""
        return {
            f"{index}.{name}": value for index, (found, _) in self._state().items() for name, value in found.items()
        }

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, for JSON."""
        rest = {str(index): others for index, (_, others) in self._state().items() if others}
        return {"updates": self.updates, "loss_scale": self._scaler.state_dict(), "kind": self.kind, "rest": rest}

    def _state(self) -> dict[int, tuple[dict[str, Tensor], dict[str, Any]]]:
        return {index: flatten(entry) for index, entry in self._optimizer.state_dict()["state"].items()}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from what `tensors` and `numbers` gave; ValueError if another library's optimiser gave it."""
        kind = numbers.get("kind", self.kind)
        if kind != self.kind:
            raise ValueError(f"the checkpoint has the optimiser state of {kind}, here {self.kind} would go on with it")
        by_index: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, name = key.split(".", 1)
            by_index.setdefault(int(index), {})[name] = value
        rest = numbers.get("rest", {})
        state = {index: unflatten(found, rest.get(str(index), {})) for index, found in by_index.items()}
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._scaler.load_state_dict(dict(numbers["loss_scale"]))
        self.updates = int(numbers["updates"])


def set_learning_rate(group: dict[str, Any], rate: float) -> None:
    """Set the rate of a parameter group in the form that its library keeps it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def make_optimizer(parameters: Sequence[nn.Parameter], settings: OptimizerSettings) -> tuple[Any, str, str | None]:
    """The optimiser, the name of what it is, and a sentence where that is not what the settings ask for."""
    if settings.name == "adamw8bit":
        return make_adamw8bit(parameters, settings)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(parameters, **adam_options(settings), fused=True), settings.name, None
