"""This package's DiT and MLP, and Sequential MLPs, once more in plain jax.numpy: one row, for ``jax.vmap``."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from torch import nn

from mfd_fast.models.dit import DiT
from mfd_fast.models.mlp import MLP

Parameters = dict[str, Array]
RowField = Callable[[Parameters, Array, Array, Array], Array]
"""``field(parameters, x [...], t [], label []) -> velocity [...]``."""


def translate(network: nn.Module, dtype: Any = jnp.float32) -> tuple[RowField, Parameters]:
    """The network as a function of one row, and its weights as arrays of ``dtype`` (time stays float32).

    Weights of Linears are copied as ``[in, out]``: the product of a single row is faster so.
    """
    tensors = {**network.state_dict(), **{name: value for name, value in network.named_buffers()}}
    linears = {f"{name}.weight" for name, part in network.named_modules() if isinstance(part, nn.Linear)}
    tensors |= {name: tensors[name].T.contiguous() for name in linears}
    parameters = {
        name: jnp.asarray(value.numpy(), jnp.float32 if "time_features" in name else dtype)
        for name, value in tensors.items()
    }
    if isinstance(network, DiT):
        return _dit(network), parameters
    if isinstance(network, MLP):
        return _mlp(network), parameters
    if isinstance(network, nn.Sequential):
        return _sequential(network), parameters
    raise TypeError(f"no jax.numpy version of a {type(network).__name__}")


def _linear(p: Parameters, name: str, x: Array) -> Array:
    y = x @ p[f"{name}.weight"]
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def _norm(x: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)


def _condition(p: Parameters, t: Array, label: Array) -> Array:
    angles = t * p["condition.time_features.angular"] + p["condition.time_features.phase"]
    hidden = _linear(p, "condition.time_in", jnp.sin(angles).astype(p["condition.time_in.weight"].dtype))
    hidden = hidden + p["condition.label.weight"][label]
    return jax.nn.silu(_linear(p, "condition.out", jax.nn.silu(hidden)))


def _dit(network: DiT) -> RowField:
    (rows, columns), (channels, height, _width) = network.grid, network.sample_shape
    side, heads, depth = height // rows, network.options["heads"], len(network.blocks)

    def attend(p: Parameters, name: str, tokens: Array) -> Array:
        length, features = tokens.shape
        qkv = _linear(p, f"{name}.qkv", tokens).reshape(length, 3, heads, features // heads)
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        scores = jnp.einsum("qhd,khd->hqk", q, k) / math.sqrt(features // heads)
        mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, -1), v)
        return _linear(p, f"{name}.project", mixed.reshape(length, features))

    def block(p: Parameters, name: str, tokens: Array, condition: Array) -> Array:
        scale_a, shift_a, gate_a, scale_m, shift_m, gate_m = jnp.split(_linear(p, f"{name}.modulation", condition), 6)
        tokens = tokens + gate_a * attend(p, name, _norm(tokens, 1e-6) * (1 + scale_a) + shift_a)
        hidden = _linear(p, f"{name}.mlp_in", _norm(tokens, 1e-6) * (1 + scale_m) + shift_m)
        return tokens + gate_m * _linear(p, f"{name}.mlp_out", jax.nn.gelu(hidden, approximate=True))

    def field(p: Parameters, x: Array, t: Array, label: Array) -> Array:
        condition = _condition(p, t, label)
        split = x.astype(p["enter.weight"].dtype).reshape(channels, rows, side, columns, side)
        patches = split.transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1)
        tokens = _linear(p, "enter", patches) + p["position"]
        for index in range(depth):
            tokens = block(p, f"blocks.{index}", tokens, condition)
        scale, shift = jnp.split(_linear(p, "modulation", condition), 2)
        out = _linear(p, "leave", _norm(tokens, 1e-6) * (1 + scale) + shift)
        back = out.reshape(rows, columns, channels, side, side).transpose(2, 0, 3, 1, 4)
        return back.reshape(x.shape).astype(x.dtype)

    return field


def _mlp(network: MLP) -> RowField:
    depth = len(network.block_in)

    def field(p: Parameters, x: Array, t: Array, label: Array) -> Array:
        condition = _condition(p, t, label)
        modulation = jnp.split(_linear(p, "modulation", condition), 2 * depth)
        flat = x.reshape(-1).astype(p["enter.weight"].dtype)
        hidden = _linear(p, "enter", flat)
        for index in range(depth):
            inner = _linear(p, f"block_in.{index}", _norm(hidden, 1e-5))
            inner = jax.nn.silu(inner * (1 + modulation[2 * index]) + modulation[2 * index + 1])
            hidden = hidden + _linear(p, f"block_out.{index}", inner)
        velocity = _linear(p, "leave", _norm(hidden, 1e-5)) + _linear(p, "skip", condition) * flat
        return velocity.reshape(x.shape).astype(x.dtype)

    return field


def _sequential(network: nn.Sequential) -> RowField:
    """Linear and SiLU layers on the state with its time appended; the label is not used."""

    def field(p: Parameters, x: Array, t: Array, label: Array) -> Array:
        hidden = jnp.concatenate([x.reshape(-1), t[None]])
        for index, layer in enumerate(network):
            hidden = _linear(p, str(index), hidden) if isinstance(layer, nn.Linear) else jax.nn.silu(hidden)
        return hidden.reshape(x.shape)

    return field


def to_jax(values: Any) -> Array:
    """A torch tensor as an array."""
    return jnp.asarray(np.asarray(values))


def to_torch(values: Array) -> torch.Tensor:
    """A finished array as a tensor; waits for it."""
    return torch.from_numpy(np.array(values))
