"""Low-rank roles on one frozen backbone (LoRA, Hu et al. 2022), run together as groups of rows of one batch.

Adapter libraries switch one adapter on for the whole batch. Here teacher, auxiliary and student rows share every
matrix product with the frozen weights, and each role adds its low-rank part to its own rows only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfd_fast.models.options import nearest
from mfd_fast.models.row_groups import GroupedNetwork, RowSpans, joined_rows, merged_groups
from mfd_fast.module_copies import copied_module, shared_copy
from mfd_fast.types import RowGroup


class LowRank(nn.Module):
    """``x -> scale * (x A^T) B^T``; A ``[rank, in]`` uniform, B ``[out, rank]`` zero, both float32.

    The products run in the dtype of ``x``, so that a bfloat16 backbone stays fast.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(base.in_features)
        values = torch.empty(rank, base.in_features, dtype=torch.float32, device="cpu")
        values.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(values.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=base.weight.device))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in]`` to ``[..., out]``."""
        inner = functional.linear(x, self.lora_A.to(x.dtype)) * self.scale
        return functional.linear(inner, self.lora_B.to(x.dtype))

    def delta(self) -> Tensor:
        """``scale * B A`` ``[out, in]`` float32: what the role adds to the weight."""
        return self.scale * (self.lora_B.detach() @ self.lora_A.detach())


class LoRALinear(nn.Module):
    """A frozen Linear and one `LowRank` for each role, added to the rows of that role: ``y[a:b] += low_rank(x[a:b])``.

    Input ``[N, ..., in]`` with rows first. Its weight is ``base.weight``: code that reads ``weight`` and multiplies by
    itself would miss the roles, so there is no such attribute.
    """

    def __init__(self, base: nn.Linear, adapters: Mapping[str, LowRank], rows: RowSpans) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict(adapters)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[N, ..., in]`` to ``[N, ..., out]``."""
        y: Tensor = self.base(x)
        spans = self.rows.spans
        if len(spans) == 1:
            role = spans[0][0]
            return y if role is None else y + self.adapters[role](x)
        if spans and x.shape[0] != spans[-1][2]:
            raise ValueError(
                f"an adapted Linear got {x.shape[0]} rows in a batch of {spans[-1][2]}: rows must be the first"
                " dimension of its input. Leave this layer out of targets, or evaluate the roles separately"
            )
        for role, start, stop in spans:
            if role is not None:
                y[start:stop] += self.adapters[role](x[start:stop])
        return y

    def low_rank(self, role: str) -> LowRank:
        """The low-rank part of a role."""
        return cast(LowRank, self.adapters[role])


class RoleField:
    """One role as a velocity field; fields of one `LoRARoles` run as one batch (`SharedBackbone`).

    Has the ``time_range``, ``sample_shape`` and ``num_classes`` of the user's module where that has them.
    """

    def __init__(self, backbone: "LoRARoles", role: str | None, network: Callable[..., Tensor] | None = None) -> None:
        self._backbone = backbone
        self.network: Callable[..., Tensor] = backbone.grouped if network is None else network
        """What computes the rows, a `mfd_fast.models.row_groups.GroupedNetwork` or a copy of one."""
        self.role = role
        """Name of the role, None for the teacher."""
        for name in ("time_range", "sample_shape", "num_classes", "feature_width"):
            if hasattr(backbone.module, name):
                setattr(self, name, getattr(backbone.module, name))

    @property
    def backbone(self) -> "LoRARoles":
        """What fields must share to be evaluated together."""
        return self._backbone

    @property
    def device(self) -> torch.device:
        """Where the backbone lies."""
        return next(self._backbone.network.parameters()).device

    def parameters(self) -> list[nn.Parameter]:
        """What an optimiser of this role trains; nothing for the teacher."""
        return [] if self.role is None else self._backbone.parameters(self.role)

    def __call__(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        """The velocity of this role at ``x`` ``[B, ...]``, ``t`` ``[B]``."""
        return self.network(x, t, condition, (self.role,))

    def with_network(self, network: Callable[..., Tensor]) -> "RoleField":
        """The same role computed by ``network``, a copy of the present one (`mfd_fast.types.OnNetwork`)."""
        return RoleField(self._backbone, self.role, network)

    def features(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        """The features of the module with this role's adapter, for modules that have a method ``features``."""
        network: Any = self._backbone.network
        self._backbone.rows.assign([(self.role, len(x))])
        try:
            found: Tensor = network.features(x, t, **condition)
        finally:
            self._backbone.rows.clear()
        return found

    def evaluate_groups(self, groups: list[RowGroup]) -> list[Tensor]:
        """Velocities of groups of rows, each for its own field of this backbone, from one forward.

        Groups whose conditions do not fit into one batch (other keys, dtypes or trailing shapes) run one by one.

        Raises:
            ValueError: a field of another backbone, or a condition with a wrong leading dimension.
        """
        roles = [self._backbone.role_of(group) for group in groups]
        joined = joined_rows(groups) if len(groups) > 1 else None
        if joined is None:
            return [group.field(group.x, group.t, **group.condition) for group in groups]
        x, t, condition = joined
        rows = [len(group.x) for group in groups]
        velocity = self.network(x, t, condition, *merged_groups(list(zip(roles, rows, strict=True))))
        return list(torch.split(velocity, rows))


class LoRARoles:
    """Teacher, auxiliary and student as one frozen backbone and a low-rank adapter for each trained role.

    The structure of the user's module is copied and its weights are shared: the module itself gets no hook, no
    gradient and no new attribute, and a change of its weights in place is seen here. Move it to its device and dtype
    before, because ``module.to(...)`` replaces weights.

    Args:
        module: the teacher, ``module(x, t, **condition) -> velocity``.
        rank: rank of the adapters.
        alpha: the adapters are scaled by ``alpha / rank``.
        targets: names of the Linears to adapt, whole or their last parts (``"qkv"``, ``"attention.qkv"``); None = all.
        roles: names of the trained roles.
        seed: of the initial A; B begins at zero, so every role begins as the teacher.

    Raises:
        ValueError: rank, alpha, roles or targets that make no adapter.
        TypeError: the module cannot be copied.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        rank: int,
        alpha: float,
        targets: Sequence[str] | None = None,
        roles: Sequence[str] = ("auxiliary", "student"),
        seed: int = 0,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"alpha must be a positive number, got {alpha}")
        if not roles or len(set(roles)) != len(roles) or not all(role.isidentifier() for role in roles):
            raise ValueError(f"roles must be one or more different identifiers, got {list(roles)}")
        self.module = module
        self.rank, self.alpha, self.roles = rank, alpha, tuple(roles)
        self.rows = RowSpans()
        self.network = shared_copy(module)
        """The adapted copy; ``train()`` and ``eval()`` on it leave the user's module alone."""
        self.layers: dict[str, LoRALinear] = {}
        """Adapted layers by their name in the user's module."""
        generator = torch.Generator().manual_seed(seed)
        for name, linear in target_linears(self.network, targets).items():
            adapters = {role: LowRank(linear, rank, alpha / rank, generator) for role in self.roles}
            self.layers[name] = LoRALinear(linear, adapters, self.rows)
        replace_modules(self.network, {id(layer.base): layer for layer in self.layers.values()})
        self.grouped = GroupedNetwork(self.network, self.rows)

    @property
    def teacher(self) -> RoleField:
        """The user's module as it is."""
        return RoleField(self, None)

    @property
    def auxiliary(self) -> RoleField:
        """The role called "auxiliary"."""
        return self.field("auxiliary")

    @property
    def student(self) -> RoleField:
        """The role called "student"."""
        return self.field("student")

    def field(self, role: str) -> RoleField:
        """The field of a role; ValueError when there is no such role."""
        self._check_role(role)
        return RoleField(self, role)

    def role_of(self, group: RowGroup) -> str | None:
        """The role of a group's field; ValueError when that field has another backbone."""
        if not isinstance(group.field, RoleField) or group.field.backbone is not self:
            raise ValueError(f"evaluate_groups got a field of another backbone: {group.field!r}")
        return group.field.role

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The trained weights of a role, float32, in the order of `state_dict`."""
        self._check_role(role)
        return [parameter for layer in self.layers.values() for parameter in layer.low_rank(role).parameters()]

    def state_dict(self, role: str) -> dict[str, Tensor]:
        """The trained weights of a role: ``LAYER.lora_A`` ``[rank, in]`` and ``LAYER.lora_B`` ``[out, rank]``."""
        return {name: parameter.detach() for name, parameter in self._named(role).items()}

    def load_state_dict(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Copy ``state`` into the weights of a role.

        Raises:
            ValueError: missing, unexpected or wrongly shaped tensors, all named; nothing is changed then.
        """
        own = self._named(role)
        shapes = {name: (tuple(own[name].shape), tuple(state[name].shape)) for name in own.keys() & state.keys()}
        problems = [f"missing {name}" for name in own if name not in state]
        problems += [f"unexpected {name}" for name in state if name not in own]
        problems += [f"{name} has shape {got}, expected {want}" for name, (want, got) in shapes.items() if want != got]
        if problems:
            raise ValueError(f"the state does not fit role {role!r}: {'; '.join(problems)}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def merged(self, role: str) -> nn.Module:
        """An independent copy of the user's module whose weights contain the role: ``W + scale * B A`` in float32."""
        self._check_role(role)
        copied = copied_module(self.module, {})
        with torch.no_grad():
            for name, layer in self.layers.items():
                linear = cast(nn.Linear, copied.get_submodule(name))
                delta = layer.low_rank(role).delta()
                weight = layer.base.weight
                wide = torch.promote_types(weight.dtype, torch.float32)
                merged = (weight.to(wide) + delta.to(wide)).to(weight.dtype)
                linear.weight = nn.Parameter(merged, requires_grad=linear.weight.requires_grad)
        return copied

    def _named(self, role: str) -> dict[str, nn.Parameter]:
        self._check_role(role)
        return {
            f"{name}.{part}": parameter
            for name, layer in self.layers.items()
            for part, parameter in layer.low_rank(role).named_parameters()
        }

    def _check_role(self, role: str) -> None:
        if role not in self.roles:
            raise ValueError(f"unknown role {role!r}{nearest(role, self.roles)}")


def target_linears(module: nn.Module, targets: Sequence[str] | None) -> dict[str, nn.Linear]:
    """Linears of ``module`` whose name is, or ends in ``.`` and, one of ``targets``; ValueError for one without any.

    Subclasses of Linear are left alone: their owners (as in nn.MultiheadAttention) read the weight itself.
    """
    linears = {name: part for name, part in module.named_modules() if type(part) is nn.Linear and name}
    if targets is None:
        chosen = linears
    else:
        ends = tuple(f".{target}" for target in targets)
        chosen = {name: part for name, part in linears.items() if f".{name}".endswith(ends)}
        for target in targets:
            if not any(f".{name}".endswith(f".{target}") for name in linears):
                raise ValueError(f"targets: no Linear is called {target!r}{nearest(target, last_parts(linears))}")
    if not chosen:
        raise ValueError("targets: there is no Linear to adapt in this module")
    return chosen


def last_parts(names: Mapping[str, Any]) -> list[str]:
    """The last part of each dotted name, once."""
    return sorted({name.rpartition(".")[2] for name in names})


def replace_modules(module: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put ``replacements[id(child)]`` wherever that child occurs below ``module``."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # named_children() skips a child met twice
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
