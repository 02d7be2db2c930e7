"""What a network needs for one row, traced on the network itself or, for SANA 1.6B, taken from measurements."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from mfd_fast.estimate.tracing import Inputs, count_operations, fake, trace_forward, trace_training
from mfd_fast.fields import autocast
from mfd_fast.models.lora import LoRARoles
from mfd_fast.models.low_precision import low_precision_bytes, products_of
from mfd_fast.training.optimizing import PRECISIONS

MIB = 2**20


class Line(NamedTuple):
    """Bytes of a number of rows: those of the first, and of each further one."""

    first: float
    more: float

    def of(self, rows: int) -> float:
        """Bytes of ``rows`` rows."""
        return self.first + (rows - 1) * self.more if rows > 0 else 0.0


class Footprint(NamedTuple):
    """Activations of a forward pass with gradient."""

    saved: Line
    """Kept for the backward pass."""
    peak: Line
    """The most at any time, backward pass included."""


class Network(NamedTuple):
    """A network as the formulas see it."""

    name: str
    parameters: int
    adapter: int
    """Parameters of one low-rank role."""
    teacher_bytes: int
    """Bytes of a number in the frozen teacher."""
    sample_bytes: int
    """Bytes of one state in float32."""
    operations: float
    """Floating-point operations of a forward pass of one row."""
    full: Footprint
    lora: Footprint
    forward: Line
    """The most bytes of a forward pass without gradient."""
    full_blocks: Footprint | None = None
    """`full` when blocks are computed again in the backward pass; None for networks that cannot."""
    lora_blocks: Footprint | None = None
    low_bytes: int = 0
    """Bytes of a copy of the weights in 8 bits, as far as they can be (`mfd_fast.models.low_precision`)."""
    note: str = ""
    """A sentence on where the numbers come from."""

    def footprint(self, kind: str, blocks: bool) -> Footprint:
        """The activations of a "full" or "lora" role."""
        plain, again = (self.full, self.full_blocks) if kind == "full" else (self.lora, self.lora_blocks)
        return again if blocks and again is not None else plain


SANA_PARAMETERS = 1_604_462_752
SANA_BLOCKS = 20
SANA_ADAPTED = 20 * 6 * (2240 + 2240)
"""Inputs and outputs of to_q, to_k and to_v of both attentions in all blocks: parameters of LoRA of rank 1."""
SANA_LOW_BYTES = 20 * (8 * 2240 * (2240 + 4) + 3 * 2240 * 5600 + 4 * (2 * 5600 + 2240))
"""The eight Linears of both attentions and the two of the feed-forward, each with a scale for an output channel."""
SANA_OPERATIONS = 2967e9
"""Of one row of 32 x 32 tokens with 300 text tokens, counted by torch's counter (docs/estimate.md)."""
# MiB of a row of 32 x 32 tokens in bfloat16 (tests/estimate/test_tracing.py measures them again): saved by a
# block, saved outside the blocks, kept of a block that is computed again, that block at its peak.
_BLOCK = {"full": 204.5, "lora": 167.9}
_OUTSIDE = {"full": 22.2, "lora": 5.7}
_KEPT = {"full": 7.0, "lora": 7.0}
_AGAIN = {"full": 206.4, "lora": 194.3}
_BACKWARD = {"full": 8.8, "lora": 32.8}
_FORWARD = 105.1 + 2.57 * SANA_BLOCKS
"""MiB of a row without gradient; the text's keys and values among them."""


def sana_1600m(precision: str, rank: int) -> Network:
    """SANA 1.6B at its 32 x 32 tokens; activations of float32 count twice."""
    size = MIB * (2 if precision == "float32" else 1)

    def line(mib: float) -> Line:
        return Line(mib * size, mib * size)

    def footprints(kind: str) -> tuple[Footprint, Footprint]:
        saved = _OUTSIDE[kind] + SANA_BLOCKS * _BLOCK[kind]
        kept = _OUTSIDE[kind] + SANA_BLOCKS * _KEPT[kind]
        plain = Footprint(line(saved), line(saved + _BACKWARD[kind]))
        return plain, Footprint(line(kept), line(kept + _AGAIN[kind]))

    (full, full_blocks), (lora, lora_blocks) = footprints("full"), footprints("lora")
    return Network(
        "SANA 1.6B",
        SANA_PARAMETERS,
        rank * SANA_ADAPTED,
        2 if precision != "float32" else 4,
        32 * 32 * 32 * 4,
        SANA_OPERATIONS,
        full,
        lora,
        line(_FORWARD),
        full_blocks,
        lora_blocks,
        SANA_LOW_BYTES,
        note="activations of SANA are measured constants for 32 x 32 tokens and 300 text tokens",
    )


def traced(
    name: str, build: Any, inputs: Inputs, precision: str, *, rank: int, targets: list[str] | None, lora: bool
) -> Network:
    """A network run without data at batch 1 and 2.

    Args:
        name: what to call it.
        build: makes the module.
        inputs: its inputs, see `mfd_fast.estimate.tracing.Inputs`; of a module's own precision, float32.
        precision: of the run; the module is run under autocast, as in the training.
        rank: rank of low-rank roles.
        targets: Linears that are adapted (None: all).
        lora: whether low-rank roles are wanted; else their numbers are those of full ones.
    """
    dtype = PRECISIONS[precision]
    with fake():
        module: nn.Module = build()
        parameters = sum(value.numel() for value in module.parameters())
        low_bytes = low_precision_bytes(products_of(module))
        field: Any = autocast(module, dtype)
        full = _footprint(field, inputs)
        first, second = (trace_forward(field, inputs, rows) for rows in (1, 2))
        operations = count_operations(field, inputs)
        sample: Tensor = inputs(1)[0]
        low, adapter = full, 0
        if lora:
            roles = LoRARoles(module.requires_grad_(False), rank=rank, alpha=float(rank), targets=targets)
            adapter = sum(value.numel() for value in roles.parameters("student"))
            low = _footprint(autocast(roles.student, dtype), inputs)
    # Copies of the weights in the precision of the products are counted apart: engines of ZeRO have none.
    copies = 0 if dtype is None else parameters * dtype.itemsize
    full = Footprint(*(Line(max(0.0, line.first - copies), line.more) for line in full))
    return Network(
        name,
        parameters,
        adapter,
        4,
        sample.numel() * 4,
        float(operations),
        full,
        low,
        Line(first, second - first),
        low_bytes=low_bytes,
        note="activations are traced on the network itself at batch 1 and 2",
    )


def _footprint(field: Any, inputs: Inputs) -> Footprint:
    one, two = (trace_training(field, inputs, rows) for rows in (1, 2))
    return Footprint(Line(one.saved, two.saved - one.saved), Line(one.peak, two.peak - one.peak))
