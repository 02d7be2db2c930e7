"""Mean Flow Distillation inside a training loop of your own: two calls do the method's work.

    python examples/existing_loop.py

The teacher is the exact velocity of eight Gaussians on a ring, the student a one-step MLP. Takes about half a minute on
one CPU core and prints the distance to the data before and after.
"""

import copy

import torch
from torch.nn.functional import mse_loss

import mfd_fast
from mfd_fast.data import load_dataset
from mfd_fast.intervals import LogitNormal, sample_pairs
from mfd_fast.methods.mfd import flow_matching_loss, surrogate_loss
from mfd_fast.metrics import sliced_wasserstein
from mfd_fast.models import build_model
from mfd_fast.path import interpolate


def main(student_updates: int = 300, batch_size: int = 256, start_updates: int = 500) -> tuple[float, float]:
    """Distances of one-step samples to the data before and after; smaller is better."""
    torch.manual_seed(0)
    data = load_dataset("mixture-2d")
    teacher = data.teacher
    assert teacher is not None
    law = LogitNormal(0.0, 1.0)

    # Start student and auxiliary from a network that has learnt the teacher's velocity.
    network = build_model("mlp", data.sample_shape, width=128)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(start_updates):
        t, noise = law.sample(batch_size), torch.randn(batch_size, 2)
        x = interpolate(data.x[torch.randint(len(data.x), (batch_size,))], noise, t)
        optimizer.zero_grad()
        mse_loss(network(x, t), teacher(x, t)).backward()
        optimizer.step()
    student, auxiliary = copy.deepcopy(network), copy.deepcopy(network)

    def generate(noise: torch.Tensor) -> torch.Tensor:
        return noise - student(noise, torch.ones(len(noise)))

    def distance() -> float:
        with torch.no_grad():
            return sliced_wasserstein(generate(torch.randn(5000, 2)), data.x[:5000])

    before = distance()
    student_optimizer = torch.optim.Adam(student.parameters(), lr=5e-4)
    auxiliary_optimizer = torch.optim.Adam(auxiliary.parameters(), lr=1e-3)
    for _ in range(student_updates):
        for _ in range(10):  # the auxiliary follows the student's samples by flow matching
            with torch.no_grad():
                samples = generate(torch.randn(batch_size, 2))
            auxiliary_optimizer.zero_grad()
            flow_matching_loss(auxiliary, samples, torch.randn(batch_size, 2), law.sample(batch_size), {}).backward()
            auxiliary_optimizer.step()
        x_t_noise, (t, r) = torch.randn(batch_size, 2), sample_pairs(law, batch_size)
        x_t = interpolate(generate(torch.randn(batch_size, 2)), x_t_noise, t)
        u_teacher, u_auxiliary = mfd_fast.mean_velocity_pair(
            teacher, auxiliary, x_t.detach(), t, r, solver="ab2", step_size=0.05
        )
        student_optimizer.zero_grad()
        surrogate_loss(x_t, u_teacher - u_auxiliary).backward()
        student_optimizer.step()
    after = distance()
    print(f"sliced Wasserstein distance of one-step samples: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main()
