"""The released training loop on this package's LoRA roles: eager, one sample at a time."""

from itertools import pairwise

import torch
from torch import Tensor

from gpu_networks import Case
from mfd_fast.methods.mfd import surrogate_loss
from mfd_fast.models.lora import LoRARoles
from mfd_fast.path import interpolate
from mfd_fast.released import released_arithmetic
from mfd_fast.types import VelocityField

LEARNING_RATE = 1e-4


class ReleasedLoop:
    """Rollouts and cycles with batches of one sample; networks compute in bfloat16."""

    def __init__(self, roles: LoRARoles, case: Case, device: torch.device, guidance: float, step_size: float) -> None:
        self._case, self._device, self._guidance, self._step_size = case, device, guidance, step_size
        self._roles = roles
        self._fields = {name: _low(getattr(roles, name)) for name in ("teacher", "auxiliary", "student")}
        self._negative = {name: value.to(device) for name, value in case.negative.items()}
        self._optimizers = {
            role: torch.optim.AdamW(roles.parameters(role), lr=LEARNING_RATE) for role in ("auxiliary", "student")
        }

    @torch.no_grad()
    def rollout(self, x: Tensor, t: Tensor, r: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean velocities of teacher and auxiliary, row by row, one network call after the other."""
        return released_arithmetic(
            self._fields["teacher"],
            self._fields["auxiliary"],
            x,
            t.to(self._device),
            r.to(self._device),
            condition=condition,
            negative_condition=self._negative,
            guidance_scale=self._guidance,
            step_size=self._step_size,
        )

    def cycle(self, rows: int) -> None:
        """Ten auxiliary updates and one of the student, the samples of a batch one after the other."""
        for _ in range(10):
            self.update("auxiliary", rows)
        self.update("student", rows)

    def update(self, role: str, rows: int) -> None:
        """One update of a role."""
        for _ in range(rows):
            given = {name: value.to(self._device) for name, value in self._case.condition(1).items()}
            loss = self._auxiliary_loss(given) if role == "auxiliary" else self._student_loss(given)
            (loss / rows).backward()
        torch.nn.utils.clip_grad_norm_(self._roles.parameters(role), 1.0)
        loss.item()  # the script logs every loss
        self._optimizers[role].step()
        self._optimizers[role].zero_grad()

    def _generate(self, given: dict[str, Tensor]) -> Tensor:
        x = torch.randn(1, *self._case.sample_shape, device=self._device)
        for now, after in pairwise(torch.linspace(1, 0, self._case.student_steps + 1).tolist()):
            time = torch.tensor([now], device=self._device)
            x = x + (after - now) * self._fields["student"](x, time, **given).float()
        return x

    def _auxiliary_loss(self, given: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            data = self._generate(given)
        noise, t = torch.randn_like(data), torch.rand(1, device=self._device)
        velocity = self._fields["auxiliary"](interpolate(data, noise, t), t, **given)
        return (velocity.float() - (noise - data)).square().mean()

    def _student_loss(self, given: dict[str, Tensor]) -> Tensor:
        data = self._generate(given)
        t, r = torch.rand(2).sort(descending=True).values.split(1)
        x_t = interpolate(data, torch.randn_like(data), t.to(self._device))
        u_teacher, u_auxiliary = self.rollout(x_t.detach(), t, r, given)
        return surrogate_loss(x_t, u_teacher - u_auxiliary)


def _low(field: VelocityField) -> VelocityField:
    """The field with its states in bfloat16, which its network computes in."""
    return lambda x, t, **condition: field(x.to(torch.bfloat16), t.float(), **condition)
