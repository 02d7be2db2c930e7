"""A residual MLP for vectors and small pictures, modulated by time and label."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfd_fast.models.base import VelocityNetwork, checked_count, zero_linear
from mfd_fast.models.embeddings import ConditionEmbedding
from mfd_fast.ops.mlp_program import ProgramBuilder, Slot


class MLP(VelocityNetwork):
    """Residual MLP whose hidden features are scaled and shifted by time and label (FiLM, Perez et al. 2018)::

        h <- h + B silu((A norm(h)) * (1 + scale(t, label)) + shift(t, label))
        velocity = C norm(h) + skip(t, label) * x

    The skip lets a one-step student cancel its noise (its sample is z - velocity(z, 1)), which features behind a norm
    only approximate. One matrix makes the scales and shifts of all blocks, so a block is seven small operations.
    Modulating after A, not before it, and a second matrix B fit the flow of 8x8 digits better at about equal cost.

    Args:
        sample_shape: shape of one sample; flattened inside.
        num_classes: number of labels, None for none.
        width: size of the hidden state.
        depth: number of residual blocks.
        block_width: size of the modulated features inside a block; None is half of ``width``.
        time_features: size of the Fourier features of time, even.
        condition_width: size of the vector that carries time and label.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        num_classes: int | None = None,
        *,
        width: int = 256,
        depth: int = 3,
        block_width: int | None = None,
        time_features: int = 64,
        condition_width: int = 64,
    ) -> None:
        block_width = max(1, width // 2) if block_width is None else block_width
        options = {"width": width, "depth": depth, "block_width": block_width}
        options |= {"time_features": time_features, "condition_width": condition_width}
        super().__init__(sample_shape, num_classes, options)
        for name, value in options.items():
            checked_count(name, value)
        self.condition = ConditionEmbedding(condition_width, self.num_classes, time_features)
        self.modulation = nn.Linear(condition_width, 2 * depth * block_width)
        self.enter = nn.Linear(self.num_features, width)
        self.block_in = nn.ModuleList(nn.Linear(width, block_width, bias=False) for _ in range(depth))
        self.block_out = nn.ModuleList(nn.Linear(block_width, width) for _ in range(depth))
        self.leave = zero_linear(width, self.num_features)
        self.skip = zero_linear(condition_width, self.num_features)
        self.feature_width = width

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """The velocity ``[B, *sample_shape]`` at ``x`` ``[B, *sample_shape]``, ``t``, ``label`` and ``r`` ``[B]``."""
        self.check_inputs(x, t)
        condition = self.condition(t, label, x.dtype, r)
        velocity: Tensor = self.leave(self._hidden(x, condition))
        return torch.addcmul(velocity, self.skip(condition), x.flatten(1)).reshape(x.shape)

    def features(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The hidden state before the last layer, ``[B, width]``."""
        self.check_inputs(x, t)
        return self._hidden(x, self.condition(t, label, x.dtype))

    def _hidden(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.modulation(condition).chunk(2 * len(self.block_in), dim=1)
        hidden = self.enter(x.flatten(1))
        blocks = zip(self.block_in, self.block_out, modulation[::2], modulation[1::2], strict=True)
        for block_in, block_out, scale, shift in blocks:
            inner = block_in(functional.layer_norm(hidden, hidden.shape[1:]))
            hidden = hidden + block_out(functional.silu(torch.addcmul(inner + shift, inner, scale)))
        return functional.layer_norm(hidden, hidden.shape[1:])

    def mlp_program(self, build: ProgramBuilder) -> Slot:
        """`forward` for fused rollouts (`mfd_fast.ops.mlp_program`)."""
        condition = self.condition.mlp_program(build)
        modulation = build.linear(condition, self.modulation)
        hidden = build.linear(build.state, self.enter)
        normed = inner = update = None
        for block, (block_in, block_out) in enumerate(zip(self.block_in, self.block_out, strict=True)):
            normed = build.layer_norm(hidden, into=normed)
            inner = build.linear(normed, block_in, into=inner)
            build.modulate(inner, modulation, 2 * block * inner.width, (2 * block + 1) * inner.width)
            update = build.linear(build.activation(inner, "silu"), block_out, into=update)
            hidden = build.add(hidden, update)
        velocity = build.linear(build.layer_norm(hidden, into=normed), self.leave)
        return build.multiply_add(velocity, build.linear(condition, self.skip), build.state)
