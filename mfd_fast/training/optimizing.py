"""The optimiser of one role with everything around it: schedule, loss scale, averaging, clipping, skipped updates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfd_fast.config import OptimizerSettings
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
        kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
        self._optimizer = kind(
            self._parameters,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
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
            group["lr"] = rate
        self._world.average_gradients(self._parameters)
        self._scaler.unscale_(self._optimizer)
        limit = self._settings.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, math.inf if limit is None else limit)
        skipped = ~norm.isfinite()
        # Where this is 1 the fused optimisers leave weights and state as they are (torch's protocol with GradScaler).
        self._optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self._optimizer.step()
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return UpdateReport(norm, rate, skipped)

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state as named tensors ``INDEX.NAME``."""
        state = self._optimizer.state_dict()["state"]
        return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, for JSON."""
        return {"updates": self.updates, "loss_scale": self._scaler.state_dict()}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from what `tensors` and `numbers` gave."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._scaler.load_state_dict(dict(numbers["loss_scale"]))
        self.updates = int(numbers["updates"])
