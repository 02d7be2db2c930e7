"""The released training loop's arithmetic on this package's LoRA roles: batch size 1, eager, a host read every step."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from gpu_networks import Case
from mfd_fast.methods.mfd import surrogate_loss
from mfd_fast.path import interpolate

LEARNING_RATE = 1e-4


class ReleasedLoop:
    """Rollouts and cycles of one sample at a time."""

    def __init__(self, roles: Any, case: Case, device: torch.device, guidance: float, step_size: float) -> None:
        self._roles, self._case, self._device = roles, case, device
        self._guidance, self._step_size = guidance, step_size
        self._optimizers = {
            role: torch.optim.AdamW(roles.parameters(role), lr=LEARNING_RATE) for role in ("auxiliary", "student")
        }

    @torch.no_grad()
    def rollout(self, x: Tensor, t: Tensor, r: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean velocities of teacher and auxiliary, row by row, one network call after the other."""
        pairs = []
        for row in range(len(x)):
            given = {name: value[row : row + 1] for name, value in condition.items()}
            one = x[row : row + 1], t[row : row + 1].to(self._device), r[row : row + 1].to(self._device)
            pairs.append((self._integrate(*one, given, guided=True), self._integrate(*one, given, guided=False)))
        teacher, auxiliary = zip(*pairs, strict=True)
        return torch.cat(teacher), torch.cat(auxiliary)

    def _integrate(self, x: Tensor, t: Tensor, r: Tensor, given: dict[str, Tensor], *, guided: bool) -> Tensor:
        dtype = torch.bfloat16
        start, end = t.to(dtype).item(), r.to(dtype).item()
        steps = max(1, math.ceil(abs(start - end) / self._step_size - 1e-6))
        grid = (torch.linspace(start, end, steps + 1) * 1000).round().div(1000).to(dtype)
        state = begin = x.to(dtype)
        for now, after in itertools.pairwise(grid):
            time = torch.tensor([now.item()], device=self._device)
            velocity = (
                self._guided(state, time, given) if guided else self._roles.auxiliary(state.to(dtype), time, **given)
            )
            state = state + torch.tensor([after.item() - now.item()], device=self._device) * velocity.float()
        return (state - begin) / (end - start)

    def _guided(self, state: Tensor, time: Tensor, given: dict[str, Tensor]) -> Tensor:
        both = {name: torch.cat([torch.zeros_like(value), value]) for name, value in given.items()}
        x = torch.cat([state, state]).to(torch.bfloat16)
        without, conditional = self._roles.teacher(x, torch.cat([time, time]), **both).chunk(2)
        velocity: Tensor = without + self._guidance * (conditional - without)
        return velocity

    def cycle(self, rows: int) -> None:
        """Ten auxiliary updates and one of the student, the samples of a batch one after the other."""
        for _ in range(10):
            self._update("auxiliary", rows)
        self._update("student", rows)

    def _update(self, role: str, rows: int) -> None:
        for _ in range(rows):
            given = {name: value.to(self._device) for name, value in self._case.condition(1).items()}
            loss = self._auxiliary_loss(given) if role == "auxiliary" else self._student_loss(given)
            (loss / rows).backward()
        torch.nn.utils.clip_grad_norm_(self._roles.parameters(role), 1.0)
        loss.item()
        self._optimizers[role].step()
        self._optimizers[role].zero_grad()

    def _generate(self, given: dict[str, Tensor]) -> Tensor:
        grid = torch.linspace(1, 0, self._case.student_steps + 1).tolist()
        x = torch.randn(1, *self._case.sample_shape, device=self._device)
        for now, after in itertools.pairwise(grid):
            time = torch.tensor([now], device=self._device)
            x = x + (after - now) * self._roles.student(x.to(torch.bfloat16), time, **given).float()
        return x

    def _auxiliary_loss(self, given: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            data = self._generate(given)
        noise, t = torch.randn_like(data), torch.rand(1, device=self._device)
        velocity = self._roles.auxiliary(interpolate(data, noise, t).to(torch.bfloat16), t, **given)
        return (velocity.float() - (noise - data)).square().mean()

    def _student_loss(self, given: dict[str, Tensor]) -> Tensor:
        data = self._generate(given)
        t, r = torch.rand(2).sort(descending=True).values.split(1)
        x_t = interpolate(data, torch.randn_like(data), t.to(self._device))
        u_teacher, u_auxiliary = self.rollout(x_t.detach(), t, r, given)
        return surrogate_loss(x_t, u_teacher - u_auxiliary)
