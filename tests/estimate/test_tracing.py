"""Traced memory against closed forms, real tensors, and the constants of SANA."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mfd_fast.estimate.network import (
    MIB,
    SANA_BLOCKS,
    SANA_OPERATIONS,
    SANA_PARAMETERS,
    Line,
    sana_1600m,
    traced,
)
from mfd_fast.estimate.tracing import Trace, count_operations, fake, trace_forward, trace_training
from mfd_fast.models.dit import DiT
from mfd_fast.models.lora import target_linears
from mfd_fast.models.sana import RELEASED_TARGETS, SanaNetwork, SanaRoles
from mfd_fast.types import VelocityField

IN, HIDDEN = 8, 32


class TwoLayers(nn.Module):
    """``W2 tanh(W1 x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(IN, HIDDEN, bias=False), nn.Linear(HIDDEN, IN, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x).tanh())
        return y


def two_layer_inputs(rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return torch.zeros(rows, IN), torch.zeros(rows), {}


@pytest.mark.parametrize("rows", [1, 6])
def test_two_layers_keep_what_can_be_counted_by_hand(rows: int) -> None:
    with fake():
        field = TwoLayers()
        found = trace_training(field, two_layer_inputs, rows)
        forward = trace_forward(field, two_layer_inputs, rows)
    assert found.saved == 4 * rows * (HIDDEN + IN)  # tanh's output and the velocity
    assert forward == 4 * rows * 2 * HIDDEN  # tanh's input and output
    assert found.peak >= 4 * rows * 2 * HIDDEN


def test_fake_tensors_count_as_real_ones() -> None:
    def inputs(rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return torch.zeros(rows, 1, 8, 8), torch.ones(rows), {"label": torch.zeros(rows, dtype=torch.int64)}

    build = partial(DiT, (1, 8, 8), 10, width=32, depth=2, heads=4)
    with fake():
        unreal = trace_training(build(), inputs, 3)
    assert trace_training(build(), inputs, 3) == unreal
    assert unreal.saved > 0


def test_two_batches_predict_a_third() -> None:
    def inputs(rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return torch.zeros(rows, 1, 8, 8), torch.ones(rows), {"label": torch.zeros(rows, dtype=torch.int64)}

    build = partial(DiT, (1, 8, 8), 10, width=32, depth=2, heads=4)
    network = traced("dit", build, inputs, "float32", rank=4, targets=None, lora=True)
    with fake():
        field = build()
        fifth = trace_training(field, inputs, 5)
    assert network.full.saved.of(5) == pytest.approx(fifth.saved, rel=0.02)
    assert network.full.peak.of(5) == pytest.approx(fifth.peak, rel=0.02)
    assert network.parameters == sum(value.numel() for value in build().parameters())
    assert 0 < network.adapter < network.parameters


def test_a_line() -> None:
    assert [Line(5, 2).of(rows) for rows in (0, 1, 3)] == [0, 5, 9]


def sana_inputs(rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    prompts = {
        "prompt_embeds": torch.zeros(rows, 300, 2304, dtype=torch.bfloat16),
        "prompt_mask": torch.ones(rows, 300),
    }
    return torch.zeros(rows, 32, 32, 32, dtype=torch.bfloat16), torch.ones(rows), prompts


def transformer(blocks: int) -> nn.Module:
    """SANA 1.6B with fewer blocks."""
    from diffusers import SanaTransformer2DModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made: nn.Module = SanaTransformer2DModel(num_layers=blocks)
    finally:
        torch.set_default_dtype(before)
    return made


def sana_row(kind: str, blocks: int, checkpoint: bool) -> tuple[Trace, float]:
    """Bytes of a second row, training and forward."""
    with fake():
        network = SanaNetwork(transformer(blocks), checkpoint_blocks=checkpoint)
        network.requires_grad_(kind == "full")
        field: VelocityField = network if kind == "full" else SanaRoles(network, rank=64).student
        one, two = (trace_training(field, sana_inputs, rows) for rows in (1, 2))
        forward = trace_forward(field, sana_inputs, 2) - trace_forward(field, sana_inputs, 1)
    return Trace(two.saved - one.saved, two.peak - one.peak), forward


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_constants_of_sana_are_those_of_the_network(kind: str, checkpoint: bool) -> None:
    (two, forward_two), (three, forward_three) = (sana_row(kind, blocks, checkpoint) for blocks in (2, 3))
    more = SANA_BLOCKS - 3
    saved = three.saved + more * (three.saved - two.saved)
    peak = three.peak + more * (three.peak - two.peak)
    network = sana_1600m("bfloat16", 64)
    footprint = network.footprint(kind, checkpoint)
    assert footprint.saved.of(1) == pytest.approx(saved, rel=0.05)
    assert footprint.peak.of(1) == pytest.approx(peak, rel=0.05)
    assert network.forward.of(1) == pytest.approx(forward_three + more * (forward_three - forward_two), rel=0.05)
    if not checkpoint:
        assert (three.saved - two.saved) / MIB == pytest.approx({"full": 204.5, "lora": 167.9}[kind], rel=0.01)


def test_counts_of_sana() -> None:
    from diffusers import SanaTransformer2DModel

    with torch.device("meta"):
        network = SanaTransformer2DModel()
    assert sum(value.numel() for value in network.parameters()) == SANA_PARAMETERS == 1_604_462_752
    linears = target_linears(network, RELEASED_TARGETS).values()
    adapter = sum(64 * (linear.in_features + linear.out_features) for linear in linears)
    assert adapter == sana_1600m("bfloat16", 64).adapter == 34_406_400


def test_operations_of_sana() -> None:
    def of(blocks: int) -> int:
        with fake():
            return count_operations(SanaNetwork(transformer(blocks)), sana_inputs)

    one, two = of(1), of(2)
    # The counter does not see the CPU's masked attention over the text, which is 2 * 2 * 1024 * 300 * 2240 a block.
    unseen = SANA_BLOCKS * 4 * 1024 * 300 * 2240
    assert one + (SANA_BLOCKS - 1) * (two - one) + unseen == pytest.approx(SANA_OPERATIONS, rel=0.01)
