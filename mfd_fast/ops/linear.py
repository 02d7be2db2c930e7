"""``x W^T + b`` in float32 on the CPU by oneDNN, where torch itself calls MKL.

On many AMD processors oneDNN's float32 matrix product is about twice as fast; on others MKL is faster.
`why_not_onednn` measures it once. The products of its derivative go through oneDNN too. It has no forward-mode
derivative: `OneDNNLinear` keeps tangents away from it, which torch would drop without a word.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

PROBE_SHAPES = ((64, 256, 256), (512, 256, 256))
"""Rows, inputs and outputs of the matrix products that are timed."""
MARGIN = 1.15
"""oneDNN is used where it is at least so many times faster; below that the gain is not worth another code path."""


@torch.library.custom_op("mfd_fast::onednn_linear", mutates_args=())
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` ``[..., in]`` times ``weight`` ``[out, in]`` transposed plus ``bias`` ``[out]``, float32 on the CPU."""
    if x.numel() == 0:  # oneDNN takes no empty products
        return functional.linear(x, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


@onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = context.saved_tensors
    of_x, of_weight, of_bias = context.needs_input_grad
    rows = gradient.reshape(-1, gradient.shape[-1])
    return (
        onednn_linear(gradient, weight.t(), None) if of_x else None,
        onednn_linear(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if of_weight else None,
        rows.sum(0) if of_bias else None,
    )


onednn_linear.register_autograd(_backward, setup_context=_keep_for_backward)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition: ``torch.nn.functional.linear``."""
    return functional.linear(x, weight, bias)


class OneDNNLinear(nn.Module):
    """A Linear whose float32 product on the CPU is oneDNN's; holds the very parameters of the Linear it replaces."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in]`` to ``[..., out]``."""
        fits = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32 and not _has_tangent(x)
        fits = fits and not torch.is_autocast_enabled("cpu")  # which casts for torch's own products only
        result: Tensor = (onednn_linear if fits else linear_reference)(x, self.weight, self.bias)
        return result


def _has_tangent(x: Tensor) -> bool:
    """Whether ``x`` is part of a forward-mode derivative."""
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None


@functools.cache
def why_not_onednn() -> str | None:
    """Why oneDNN's product is not used on this machine, or None where it is faster."""
    try:
        gain = min(_gain(*shape) for shape in PROBE_SHAPES)
    except (RuntimeError, AttributeError) as error:
        return f"this torch has no such operator ({error})"
    return None if gain >= MARGIN else f"oneDNN's float32 matrix product is {gain:.2f} times as fast as torch's own"


def _gain(rows: int, inputs: int, outputs: int) -> float:
    """How many times faster oneDNN is at one shape, with the threads torch uses now; its result is checked too."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float32, device="cpu") for s in shapes)
    with torch.no_grad():
        if not torch.allclose(onednn_linear(x, weight, bias), linear_reference(x, weight, bias), rtol=1e-4, atol=1e-3):
            raise RuntimeError("its result is wrong")
        own = _seconds(lambda: linear_reference(x, weight, bias))
        return own / _seconds(lambda: onednn_linear(x, weight, bias))


def _seconds(call: Callable[[], Tensor]) -> float:
    """Shortest of several timings of ten calls."""
    best = float("inf")
    for _ in range(7):
        begin = time.perf_counter()
        for _ in range(10):
            call()
        best = min(best, time.perf_counter() - begin)
    return best
