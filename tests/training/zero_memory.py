"""Bytes that a role in an engine takes, counted in two processes."""

import gc
from pathlib import Path

import torch
from ranks import fork
from torch import Tensor, nn

from mfd_fast.estimate.tracing import LiveBytes
from mfd_fast.settings_io import load_settings
from mfd_fast.storage import read_json, write_json
from mfd_fast.training import zero
from mfd_fast.training.context import Context
from mfd_fast.training.distributed import join_world
from mfd_fast.training.zero_roles import ZeroOptimizer

LAYERS, WIDTH = 16, 512  # stage 3 keeps weights of less than 100 thousand numbers whole
WEIGHTS = LAYERS * WIDTH**2
GROUP = WEIGHTS // 4
CASES = [(1, False), (2, False), (3, False), (2, True), (3, True)]
"""Stage and offload."""


class Layers(nn.Module):
    """Weights, and next to no activations for one row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class RealBytes(LiveBytes):
    """DeepSpeed makes tensors without memory for their shapes."""

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._count(storage)


def measure(stage: int, offload: bool) -> dict[str, float]:
    """Bytes a weight in this process: between updates, and the most of backward pass and step beside that."""
    zero.BUCKET, zero.GROUP = 1000, GROUP
    wanted = [f"distill.zero_stage={stage}", f"distill.zero_offload={offload}".lower(), "distill.batch_size=2"]
    settings = load_settings("mixture-2d", None, [*wanted, "distill.precision=bfloat16"]).distill
    context = Context(torch.device("cpu"), join_world("cpu"))
    teacher = Layers().bfloat16()
    with RealBytes() as memory:
        role = zero.Sharded(teacher, settings, settings.auxiliary_optimizer, context)
        optimizer, field = ZeroOptimizer(role, settings.auxiliary_optimizer, total_updates=9), role.field()
        gc.collect()
        kept = memory.live
        for _ in range(2):
            memory.peak = memory.live
            optimizer.backward(field(torch.randn(1, WIDTH), torch.ones(1)).float().square().mean(), 1)
            backward, memory.peak = memory.peak, memory.live
            optimizer.step()
            gc.collect()
    found = {"kept": kept, "backward": backward - kept, "step": memory.peak - kept, "after": memory.live - kept}
    return {name: size / WEIGHTS for name, size in found.items()}


def measure_all(folder: Path) -> list[dict[str, float]]:
    """Each of `CASES`, with the sizes of network and group and what the main process found."""
    found = []
    for stage, offload in CASES:
        stem = folder / f"memory-{stage}-{offload}"

        def work(rank: int, stage: int = stage, offload: bool = offload, stem: Path = stem) -> int:
            torch.set_num_threads(1)
            write_json(stem.with_name(f"{stem.name}-{rank}.json"), measure(stage, offload))
            return 0

        assert fork(2, str(stem), work) == [0, 0], Path(f"{stem}-0.txt").read_text()
        case = {"stage": stage, "offload": offload, "weights": WEIGHTS, "group": GROUP}
        found.append(case | read_json(stem.with_name(f"{stem.name}-0.json")))
    return found
