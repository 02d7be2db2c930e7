"""What is integrated: seeded draws of states and intervals, and what the right answer is."""

import copy
import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mfd_fast
from fields import FOLDER, NO_LABEL, Pair
from mfd_fast.data import load_dataset
from mfd_fast.intervals import LogitNormal, sample_pairs
from mfd_fast.path import interpolate
from mfd_fast.storage import read_tensors, write_tensors

GUIDANCE = 4.5
STEP_SIZE = 0.02
FINE_STEP = 0.03
"""Fourth-order steps of the reference, in float64."""
Velocities = tuple[Tensor, Tensor]
"""Mean velocities of the guided teacher and of the auxiliary, ``[B, ...]`` each."""


class Draw(NamedTuple):
    """One batch: noised digits with an interval of its own for every row."""

    x: Tensor
    t: Tensor
    r: Tensor
    label: Tensor

    def first(self, rows: int) -> "Draw":
        """The first rows."""
        return Draw(*(part[:rows] for part in self))

    def evaluations(self, step_size: float = STEP_SIZE) -> int:
        """Network rows that Euler steps of at most ``step_size`` need: guided teacher and auxiliary."""
        steps = ((self.t - self.r).double() / step_size - 1e-6).ceil().clamp(min=1)
        return 3 * int(steps.sum())


def make_draw(seed: int, rows: int = 64) -> Draw:
    """Draw number ``seed``: logit-normal(-0.4, 1) pairs, digits noised to the later time."""
    generator = torch.Generator().manual_seed(1000 + seed)
    dataset = load_dataset("digits")
    index = torch.randint(len(dataset.x), (rows,), generator=generator)
    t, r = sample_pairs(LogitNormal(-0.4, 1.0), rows, generator=generator)
    noise = torch.randn(rows, *dataset.sample_shape, generator=generator)
    return Draw(interpolate(dataset.x[index], noise, t), t, r, dataset.label[index])


def conditions(draw: Draw) -> dict[str, Any]:
    """The keyword arguments of `mfd_fast.mean_velocity_pair` for a draw."""
    return {
        "condition": {"label": draw.label},
        "negative_condition": {"label": torch.tensor([NO_LABEL])},
        "guidance_scale": GUIDANCE,
    }


def fine_velocities(pair: Pair, draw: Draw) -> Velocities:
    """Mean velocities in float64 by fourth-order steps; computed once and kept beside the weights of the pair."""
    digest = hashlib.sha256(f"{weights_digest(pair)} {FINE_STEP} {GUIDANCE}".encode())
    for part in draw:
        digest.update(part.numpy().tobytes())
    file = FOLDER / f"fine-{digest.hexdigest()[:16]}.safetensors"
    if not file.is_file():
        teacher, auxiliary = (copy.deepcopy(network).double() for network in pair[:2])
        u_teacher, u_auxiliary = mfd_fast.mean_velocity_pair(
            teacher, auxiliary, draw.x.double(), draw.t.double(), draw.r.double(),
            solver="rk4", step_size=FINE_STEP, runner="eager", **conditions(draw),
        )  # fmt: skip
        write_tensors(file, {"teacher": u_teacher, "auxiliary": u_auxiliary})
    kept = read_tensors(file)
    return kept["teacher"], kept["auxiliary"]


def weights_digest(pair: Pair) -> str:
    """A name for the weights of both fields."""
    digest = hashlib.sha256()
    for network in pair[:2]:
        for value in network.state_dict().values():
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]


def gradient_error(u: Velocities, fine: Velocities) -> float:
    """Relative error of ``u_teacher - u_auxiliary``, the student's gradient, over all rows."""
    own, exact = (first.double() - second.double() for first, second in (u, fine))
    return float((own - exact).norm() / exact.norm())
