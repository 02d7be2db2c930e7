"""OccFM's transition model a second time, from its formulas: functions of a dictionary of weights, in float64, with
every sum over heads and channels written out. Slow on purpose; nothing of the package is used.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Sizes(NamedTuple):
    """What the weights alone do not say."""

    temporal_heads: int
    spatial_heads: int
    trajectory_length: int
    fourier: int = 8


def velocity(weights: Mapping[str, Tensor], sizes: Sizes, x: Tensor, t: Tensor, trajectory: Tensor | None) -> Tensor:
    """``[B, F, C, H, W]`` of the same shape of ``x``; ``t`` ``[B]`` up to 1000; ``trajectory`` ``[B, L, 2]``."""
    w = {name: value.double() for name, value in weights.items()}
    x, t = x.double(), t.double()
    emb = two_layers(w, "t_embedder", clock(t, w["t_embedder.0.weight"].shape[1]))
    if trajectory is not None:
        seen = trajectory.double()[:, : sizes.trajectory_length]
        emb = emb + two_layers(w, "traj_encoder", poses(seen, sizes.fourier))
    bias = frame_bias(w["time_rel_pos_bias.relative_attention_bias.weight"], x.shape[1])
    x = torch.einsum("bfchw->bcfhw", x)
    x = conv(w, "init_conv", x, pad=w["init_conv.weight"].shape[-1] // 2)
    x = x + residual_attention(w, "init_temporal_attn", x, sizes.temporal_heads, bias)
    begin, stack, level = x, [], 0
    while f"downs.{level}.0.mlp.1.weight" in w:
        x = resnet(w, f"downs.{level}.1", resnet(w, f"downs.{level}.0", x, emb), emb)
        x = mix(w, f"downs.{level}", x, emb, sizes.spatial_heads, first=level == 0)
        stack.append(x)
        if f"downs.{level}.5.weight" in w:
            x = conv(w, f"downs.{level}.5", x, pad=1, stride=2)
        level += 1
    x = resnet(w, "mid_block1", x, emb)
    x = residual_attention(w, "mid_spatial_attn", x, sizes.spatial_heads, None)
    x = residual_attention(w, "mid_temporal_attn", x, sizes.temporal_heads, bias)
    x = resnet(w, "mid_block2", x, emb)
    for up in range(level):
        x = torch.cat([x, stack.pop()], 1)
        x = resnet(w, f"ups.{up}.1", resnet(w, f"ups.{up}.0", x, emb), emb)
        x = mix(w, f"ups.{up}", x, emb, sizes.spatial_heads, first=False)
        if f"ups.{up}.4.weight" in w:
            name = f"ups.{up}.4"
            x = F.conv_transpose3d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=(1, 2, 2), padding=(0, 1, 1))
    x = resnet(w, "final_conv.0", torch.cat([x, begin], 1), None)
    return torch.einsum("bcfhw->bfchw", conv(w, "final_conv.1", x, pad=0))


def clock(t: Tensor, width: int) -> Tensor:
    rates = torch.tensor([10000.0 ** (-i / (width // 2)) for i in range(width // 2)], dtype=torch.float64)
    return torch.cat([torch.cos(torch.outer(t, rates)), torch.sin(torch.outer(t, rates))], 1)


def poses(trajectory: Tensor, scales: int) -> Tensor:
    columns = []
    for pose in trajectory.unbind(1):
        for k in range(scales):
            for wave in (torch.sin, torch.cos):
                columns += [wave(100 ** (k / scales) * pose[:, axis]) for axis in (0, 1)]
    return torch.stack(columns, 1)


def two_layers(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    hidden = x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"]
    return (hidden * torch.sigmoid(hidden)) @ w[f"{name}.2.weight"].T + w[f"{name}.2.bias"]


def frame_bias(table: Tensor, frames: int) -> Tensor:
    def bucket(query: int, key: int) -> int:
        far = abs(query - key)
        if far >= 8:
            far = min(15, 8 + int(math.log2(far / 8) * 8 + 1e-9))
        return far + 16 * (key > query)

    rows = [torch.stack([table[bucket(i, j)] for j in range(frames)]) for i in range(frames)]
    return torch.einsum("ijh->hij", torch.stack(rows))


def conv(w: Mapping[str, Tensor], name: str, x: Tensor, pad: int, stride: int = 1) -> Tensor:
    return F.conv3d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=(1, stride, stride), padding=(0, pad, pad))


def resnet(w: Mapping[str, Tensor], name: str, x: Tensor, emb: Tensor | None) -> Tensor:
    h = unit(conv(w, f"{name}.block1.proj", x, pad=1)) * w[f"{name}.block1.norm.gamma"]
    if f"{name}.mlp.1.weight" in w:
        assert emb is not None
        moved = (emb * torch.sigmoid(emb)) @ w[f"{name}.mlp.1.weight"].T + w[f"{name}.mlp.1.bias"]
        scale, shift = moved[:, :, None, None, None].tensor_split(2, 1)
        h = h + h * scale + shift
    h = unit(conv(w, f"{name}.block2.proj", h * torch.sigmoid(h), pad=1)) * w[f"{name}.block2.norm.gamma"]
    h = h * torch.sigmoid(h)
    return h + (conv(w, f"{name}.res_conv", x, pad=0) if f"{name}.res_conv.weight" in w else x)


def unit(x: Tensor) -> Tensor:
    return x * math.sqrt(x.shape[1]) / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-12)


def residual_attention(w: Mapping[str, Tensor], name: str, x: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """Over frames where there is a bias, else over places."""
    centred = x - x.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.fn.norm.gamma"]
    parts = torch.einsum("bcfhw,oc->bofhw", normed, w[f"{name}.fn.fn.fn.to_qkv.weight"]).unflatten(1, (3, heads, -1))
    q, k, v = parts.unbind(1)  # [B, heads, d, F, H, W]
    if bias is not None:
        scores = torch.einsum("bedfhw,bedghw->behwfg", q, k) / math.sqrt(q.shape[2]) + bias[:, None, None]
        mixed = torch.einsum("behwfg,bedghw->bedfhw", scores.softmax(-1), v)
    else:
        q, k, v = (part.flatten(4) for part in (q, k, v))
        scores = torch.einsum("bedfp,bedfr->befpr", q, k) / math.sqrt(q.shape[2])
        mixed = torch.einsum("befpr,bedfr->bedfp", scores.softmax(-1), v).unflatten(4, x.shape[3:])
    return x + torch.einsum("bcfhw,oc->bofhw", mixed.flatten(1, 2), w[f"{name}.fn.fn.fn.to_out.weight"])


def mix(w: Mapping[str, Tensor], name: str, x: Tensor, emb: Tensor, heads: int, first: bool) -> Tensor:
    """Two blocks, over the places of a frame and over the frames of a place, sequence by sequence."""
    out = torch.empty_like(x)
    for row in range(len(x)):
        tokens = torch.einsum("cfhw->fhwc", x[row]).flatten(1, 2)  # [F, places, C]
        tokens = tokens + w["pos_embed"] if first else tokens
        tokens = block(w, f"{name}.2", tokens, emb[row], heads).transpose(0, 1)
        tokens = tokens + w["temp_embed"] if first else tokens
        tokens = block(w, f"{name}.3", tokens, emb[row], heads)
        out[row] = torch.einsum("pfc->cfp", tokens).unflatten(2, x.shape[3:])
    return out


def block(w: Mapping[str, Tensor], name: str, tokens: Tensor, emb: Tensor, heads: int) -> Tensor:
    modulation = w[f"{name}.adaLN_modulation.1.weight"] @ (emb * torch.sigmoid(emb))
    parts = (modulation + w[f"{name}.adaLN_modulation.1.bias"]).tensor_split(6)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    tokens = tokens + gate1 * attend(w, f"{name}.attn", norm(tokens) * (1 + scale1) + shift1, heads)
    hidden = (norm(tokens) * (1 + scale2) + shift2) @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"]
    hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return tokens + gate2 * (hidden @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"])


def norm(tokens: Tensor) -> Tensor:
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def attend(w: Mapping[str, Tensor], name: str, tokens: Tensor, heads: int) -> Tensor:
    """Attention of each row of ``[R, L, C]``; number ``i`` of a row's result, counted head by head, then token by
    token, then feature by feature, becomes feature ``i % C`` of token ``i // C``.
    """
    rows, length, width = tokens.shape
    d = width // heads
    qkv = tokens @ w[f"{name}.qkv.weight"].T + w[f"{name}.qkv.bias"]
    result = torch.empty(rows, heads * length * d, dtype=torch.float64)
    for head in range(heads):
        q, k, v = (qkv[:, :, part * width + head * d : part * width + (head + 1) * d] for part in range(3))
        share = torch.einsum("rld,rmd->rlm", q, k).div(math.sqrt(d)).softmax(-1)
        result[:, head * length * d : (head + 1) * length * d] = torch.einsum("rlm,rmd->rld", share, v).flatten(1)
    index = torch.arange(length)[:, None] * width + torch.arange(width)
    return result[:, index] @ w[f"{name}.proj.weight"].T + w[f"{name}.proj.bias"]
