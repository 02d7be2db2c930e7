"""A teacher of your own: any module ``field(x, t) -> velocity`` with 0 = data, 1 = noise, velocity = noise - data.

From Python: ``python examples/own_teacher.py``. From the command line, if ``build`` were in your ``package.module``:

    mfd-fast doctor  --field package.module:build --weights teacher.safetensors --data samples.npz
    mfd-fast distill --teacher package.module:build --weights teacher.safetensors --run runs/mine
    mfd-fast sample  runs/mine --num 100 --out samples.npz --trust-code

A network with 0 = noise, or one that predicts data or noise, is wrapped first: see ``mfd_fast.fields``.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

import mfd_fast
from mfd_fast.path import interpolate


class Teacher(nn.Module):
    """A small network on 2-D points."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity ``[B, 2]`` at ``x`` ``[B, 2]``, ``t`` ``[B]``."""
        velocity: Tensor = self.body(torch.cat([x, t[:, None]], dim=1))
        return velocity


def build() -> nn.Module:
    """What ``--teacher package.module:build`` calls."""
    return Teacher()


def train(teacher: nn.Module, updates: int) -> None:
    """Flow matching on points around (2, 0)."""
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(updates):
        data = torch.tensor([2.0, 0.0]) + 0.3 * torch.randn(256, 2)
        noise, t = torch.randn(256, 2), torch.rand(256)
        loss = (teacher(interpolate(data, noise, t), t) - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(run: Path = Path("runs/own-teacher"), student_updates: int = 200, teacher_updates: int = 1500) -> Tensor:
    """Train the teacher, distil it, sample the student once; returns mean and standard deviation of the samples."""
    torch.manual_seed(0)
    teacher = build()
    train(teacher, teacher_updates)
    settings = mfd_fast.load_settings("mixture-2d", overrides=[f"distill.student_updates={student_updates}"])
    student = mfd_fast.distill(teacher, settings, mfd_fast.Task(sample_shape=(2,), conditions={}), run)
    samples = student.sample(2000, seed=0)
    print(f"one-step samples: mean {samples.mean(0).tolist()}, standard deviation {samples.std(0).tolist()}")
    return torch.stack([samples.mean(0), samples.std(0)])


if __name__ == "__main__":
    main()
