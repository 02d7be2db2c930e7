"""Copies of frozen networks that compute with weights and inputs of 8 bits (`mfd_fast.ops.quantized_linear`)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.models.lora import replace_modules
from mfd_fast.module_copies import shared_copy
from mfd_fast.ops.quantized_linear import quantize_rows, quantized_linear


class QuantizedLinear(nn.Module):
    """A Linear, or a 1x1 convolution on tokens, with weights of 8 bits; the bias stays as it is and is shared.

    Its weights are called ``values``, so that code which reads ``weight`` and multiplies by itself fails loudly.
    """

    values: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str) -> None:
        super().__init__()
        values, scale = quantize_rows(weight.detach().flatten(1), kind)
        self.kind = kind
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in]`` to ``[..., out]``."""
        return quantized_linear(x, self.values, self.scale, self.bias, self.kind)


def products_of(module: nn.Module) -> list[Any]:
    """What is quantised: what the module's own ``products()`` says, else its plain Linears."""
    own = getattr(module, "products", None)
    if own is not None:
        return list(own())
    return [part for part in module.modules() if type(part) is nn.Linear]


@torch.no_grad()
def low_precision_copy(module: nn.Module, kind: str) -> nn.Module:
    """``module`` with its matrix products in 8 bits; the module stays as it is, and all other weights are shared.

    Args:
        module: a frozen network on its device; later changes of the weights that are quantised are not seen.
        kind: "int8" or "fp8".

    Raises:
        ValueError: it has nothing to quantise.
    """
    copied = shared_copy(module)
    parts = products_of(copied)
    if not parts:
        raise ValueError(f"{type(module).__name__} has no Linear to compute in {kind}")
    replace_modules(copied, {id(part): QuantizedLinear(part.weight, part.bias, kind) for part in parts})
    return copied


def low_precision_bytes(parts: Sequence[Any]) -> int:
    """Bytes of the weights and scales of 8 bits that stand for the weights of ``parts``."""
    return sum(part.weight.numel() + 4 * part.weight.shape[0] for part in parts)
