"""A Linear whose weights and inputs have 8 bits, with a scale for each output channel and each row of the input::

    y = q(x) q(W)^T * s(x) s(W)^T + b,    s(row) = max |row| / largest,    q(row) = row / s(row) in int8 or e4m3

Weights are quantised once, inputs in every call. Products of 8 bits run where the hardware has them; elsewhere the
definition computes the same product from the same 8 bits in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Format(NamedTuple):
    """Numbers of 8 bits."""

    dtype: torch.dtype
    largest: float


FORMATS = {"int8": Format(torch.int8, 127.0), "fp8": Format(torch.float8_e4m3fn, 448.0)}
CUDA_ROWS = 17
"""Fewest rows of cuBLAS's product of int8."""
CUDA_MULTIPLE = 16
"""Widths of products of 8 bits on CUDA are multiples of this."""
FP8_CAPABILITY = (8, 9)
"""First NVIDIA GPUs with products of e4m3."""


def quantize_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``x`` ``[N, K]`` as numbers of 8 bits ``[N, K]`` and the scale of each row, float32 ``[N, 1]``.

    A row that is not finite gets a scale that is not, so that it stays visible.
    """
    form = FORMATS[kind]
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / form.largest).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = wide / scale
    return (scaled.round() if form.dtype == torch.int8 else scaled).to(form.dtype), scale


def quantized_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The definition; arguments of `quantized_linear`."""
    rows, row_scale = quantize_rows(x.flatten(0, -2), kind)
    with torch.autocast(x.device.type, enabled=False):
        product = functional.linear(rows.float(), weight.float())
    return _finished(product, row_scale, scale, bias, x)


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The Linear; a constant: nothing here has a derivative that means anything.

    Args:
        x: ``[..., in]``, float.
        weight: ``[out, in]`` from `quantize_rows`.
        scale: its scales ``[out, 1]``.
        bias: ``[out]``.
        kind: "int8" or "fp8".

    Returns:
        ``[..., out]`` in the type that autocast asks for, else that of ``x``.
    """
    if not has_product(kind, x, weight):
        return quantized_linear_reference(x, weight, scale, bias, kind)
    rows, row_scale = quantize_rows(x.flatten(0, -2), kind)
    return _finished(PRODUCTS[kind](rows, weight), row_scale, scale, bias, x)


def has_product(kind: str, x: Tensor, weight: Tensor) -> bool:
    """Whether a product of 8 bits can be used here: int8 on the CPU, both on NVIDIA GPUs that have them."""
    if not x.is_cuda:
        return kind == "int8" and not x.is_meta
    fits = all(size % CUDA_MULTIPLE == 0 for size in weight.shape)
    if kind == "int8":
        return fits and x.numel() // x.shape[-1] >= CUDA_ROWS
    return fits and torch.cuda.get_device_capability(x.device) >= FP8_CAPABILITY


def int8_product(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows weight^T`` of int8, summed in int32, as float32."""
    product: Tensor = torch._int_mm(rows, weight.t())
    return product.float()


def fp8_product(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows weight^T`` of e4m3, summed in float32."""
    one = torch.ones((), device=rows.device)
    product: Tensor = torch._scaled_mm(rows, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    return product


PRODUCTS = {"int8": int8_product, "fp8": fp8_product}


def _finished(product: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The product with its scales and the bias, in the shape and type of the result."""
    y = product * row_scale * scale.t()
    if bias is not None:
        y = y + bias.float()
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return y.to(dtype).view(*x.shape[:-1], -1)
