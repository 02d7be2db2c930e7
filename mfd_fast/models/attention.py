"""Attention with a choice of backend, and the reason when a backend cannot be used here."""

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mfd_fast.models.options import nearest

HALF_TYPES = (torch.float16, torch.bfloat16)
SHORT = 32 * 32
"""Pairs of tokens up to which the CPU takes `_written_out`: measured faster at 16 x 16, slower at 64 x 64."""
MOST_ROWS = 2**16 - 1
"""Rows of one call. CUDA launches no more blocks along the dimension that flash attention, torch's too, gives the batch
(Dao-AILab/flash-attention issue 1786); attention over frames has a row for every place, 2500 for one sample of OccFM.
"""


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None and q.device.type == "cpu" and q.dtype in HALF_TYPES and q.shape[2] * k.shape[2] <= SHORT:
        return _written_out(q, k, v)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by its formula, in float32: on the CPU faster than torch's kernel for few low-precision tokens."""
    scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
    mixed: Tensor = scores.softmax(-1) @ v.float()
    return mixed.to(q.dtype)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        raise ValueError("attention backend 'flash-attn' takes no mask; use 'sdpa' or 'xformers'")
    out: Tensor = importlib.import_module("flash_attn").flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    ops = importlib.import_module("xformers.ops")
    bias = None if mask is None else _additive_bias(q, k, mask)
    out: Tensor = ops.memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=bias)
    return out.transpose(1, 2)


def _additive_bias(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """``mask`` as numbers to add to the scores, ``[B, heads, Lq, Lk]`` with rows aligned to eight numbers."""
    shape = (*q.shape[:3], k.shape[2])
    padded = -(-k.shape[2] // 8) * 8
    bias = q.new_zeros(*shape[:3], padded)[..., : k.shape[2]]
    if mask.dtype == torch.bool:
        return bias.masked_fill_(~mask.expand(shape), float("-inf"))
    return bias.copy_(mask.expand(shape))


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, heads, L, head_dim]`` of one projection ``[B, L, 3 * heads * head_dim]``."""
    batch, length, features = qkv.shape
    q, k, v = qkv.reshape(batch, length, 3, heads, features // (3 * heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def merge_heads(x: Tensor) -> Tensor:
    """``[B, heads, L, head_dim]`` to ``[B, L, heads * head_dim]``."""
    return x.transpose(1, 2).flatten(2)


def _sdpa_reason(device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    return None


def _flash_attn_reason(device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    if reason := _missing("flash_attn", "flash-attn") or _not_cuda(device):
        return reason
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or more, {device} has less"
    if dtype not in HALF_TYPES:
        return f"it computes in float16 or bfloat16 only, not {dtype}"
    return _head_dim_reason(head_dim)


def _xformers_reason(device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    if reason := _missing("xformers", "xformers") or _not_cuda(device):
        return reason
    if dtype not in (*HALF_TYPES, torch.float32):
        return f"it computes in float16, bfloat16 or float32 only, not {dtype}"
    return _head_dim_reason(head_dim)


def _missing(module: str, package: str) -> str | None:
    if module in sys.modules or importlib.util.find_spec(module) is not None:
        return None
    return f"the package is not installed (pip install {package})"


def _not_cuda(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs tensors on a CUDA device, got {device}"
    return None if torch.cuda.is_available() else "there is no CUDA device here"


def _head_dim_reason(head_dim: int | None) -> str | None:
    if head_dim is not None and (head_dim > 256 or head_dim % 8):
        return f"it needs a head_dim that is a multiple of 8 up to 256, got {head_dim}"
    return None


class Backend(NamedTuple):
    """A way to compute attention."""

    run: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    """q, k, v ``[B, heads, L, head_dim]`` and a mask or None, to ``[B, heads, L, head_dim]``."""
    why_not: Callable[[torch.device, torch.dtype, int | None], str | None]
    """The reason why it cannot be used for this device, dtype and head_dim, or None."""


ATTENTION_BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(_sdpa, _sdpa_reason),
    "flash-attn": Backend(_flash_attn, _flash_attn_reason),
    "xformers": Backend(_xformers, _xformers_reason),
}


def check_backend(backend: str) -> None:
    """Raise ValueError, with the nearest valid name, unless ``backend`` is one of ``ATTENTION_BACKENDS``."""
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}{nearest(backend, ATTENTION_BACKENDS)}")


def why_unavailable(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why attention ``backend`` cannot be used for tensors of this device, dtype and head_dim; None if it can."""
    check_backend(backend)
    return ATTENTION_BACKENDS[backend].why_not(device, dtype, head_dim)


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "sdpa", mask: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(head_dim) + mask) v``.

    Args:
        q, k, v: ``[B, heads, L, head_dim]``.
        backend: a name in ``ATTENTION_BACKENDS``.
        mask: bool (True = attend) or numbers to add to the scores; broadcasts to ``[B, heads, Lq, Lk]``.

    Returns:
        ``[B, heads, L, head_dim]``.

    Raises:
        ValueError: unknown backend, or a mask for a backend that takes none.
        RuntimeError: the backend cannot be used here; the message says why and what to do.
    """
    # Looking for packages cannot be traced; a compiled call then fails with the backend's own error.
    checked = backend != "sdpa" and not torch.compiler.is_compiling()
    if checked and (reason := why_unavailable(backend, q.device, q.dtype, q.shape[-1])):
        raise RuntimeError(f"attention backend {backend!r} cannot be used: {reason}; or choose attention='sdpa'")
    run = ATTENTION_BACKENDS[backend].run
    if q.shape[0] <= MOST_ROWS:
        return run(q, k, v, mask)
    own_rows = mask is not None and mask.dim() == 4 and mask.shape[0] > 1
    masks = mask.split(MOST_ROWS) if mask is not None and own_rows else itertools.repeat(mask)
    return torch.cat([run(*part) for part in zip(*(x.split(MOST_ROWS) for x in (q, k, v)), masks, strict=False)])
