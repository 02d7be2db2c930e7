"""Roles on a SANA transformer that carries adapters of peft: a training script keeps its adapters and optimisers."""

from typing import Any, cast

from torch import nn

from mfd_fast.models.lora import replace_modules
from mfd_fast.models.options import nearest
from mfd_fast.models.sana import SanaRoles
from mfd_fast.module_copies import shared_copy


def roles_from_peft(
    transformer: nn.Module, *, student: str = "default", auxiliary: str = "aux", checkpoint_blocks: bool = False
) -> SanaRoles:
    """`SanaRoles` whose adapters are the very parameters of two adapters that ``transformer.add_adapter`` made.

    What an optimiser does to them is seen on both sides. Gradients arrive in those that require them, which peft's
    ``set_adapter`` switches. Else it does not matter which adapters are switched on in the transformer: the teacher is
    the transformer without any. The names of the defaults are those of the released script.

    Args:
        transformer: a `SanaTransformer2DModel` with adapters; unwrap it from DDP or accelerate first.
        student: name of the student's adapter.
        auxiliary: name of the auxiliary's adapter.
        checkpoint_blocks: see `mfd_fast.models.sana.SanaNetwork`.

    Raises:
        ValueError: no adapters, no adapter of that name, or one that is more than a plain low-rank product.
    """
    adapted = {name: part for name, part in transformer.named_modules() if _is_adapted(part)}
    if not adapted:
        raise ValueError("the transformer has no adapters of peft: call add_adapter on it before, or use SanaRoles")
    names = {"auxiliary": auxiliary, "student": student}
    layers = {
        name: {role: _plain(name, part, adapter) for role, adapter in names.items()} for name, part in adapted.items()
    }
    rank, alpha = _rank_and_alpha(layers)
    bare = shared_copy(transformer)
    replace_modules(bare, {id(part): part.base_layer for part in cast(Any, bare).modules() if _is_adapted(part)})
    roles = SanaRoles(bare, rank=rank, lora_alpha=alpha, targets=tuple(layers), checkpoint_blocks=checkpoint_blocks)
    for name, by_role in layers.items():
        for role, (down, up, _) in by_role.items():
            low_rank = roles.layers[f"transformer.{name}"].low_rank(role)
            low_rank.lora_A, low_rank.lora_B = down, up
    return roles


def _is_adapted(part: Any) -> bool:
    return hasattr(part, "base_layer") and hasattr(part, "lora_A")


def _plain(name: str, part: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter, float]:
    """A, B and scale of an adapter in one layer."""
    if adapter not in part.lora_A:
        raise ValueError(f"{name} has no adapter called {adapter!r}{nearest(adapter, list(part.lora_A))}")
    dropout = part.lora_dropout[adapter] if adapter in part.lora_dropout else nn.Identity()
    if type(part.base_layer) is not nn.Linear or not isinstance(dropout, nn.Identity) or part.use_dora.get(adapter):
        raise ValueError(f"adapter {adapter!r} of {name} must be a plain one on a Linear, without dropout or DoRA")
    if part.merged_adapters:
        raise ValueError(f"adapters are merged into {name}: unmerge them first")
    down, up = part.lora_A[adapter], part.lora_B[adapter]
    if up.bias is not None:
        raise ValueError(f"adapter {adapter!r} of {name} has a bias, which is not supported")
    return down.weight, up.weight, float(part.scaling[adapter])


def _rank_and_alpha(layers: dict[str, dict[str, tuple[nn.Parameter, nn.Parameter, float]]]) -> tuple[int, float]:
    """The rank and alpha that all adapters have; ValueError when they differ."""
    found = {(down.shape[0], scale) for by_role in layers.values() for down, _, scale in by_role.values()}
    if len(found) != 1:
        shown = ", ".join(f"rank {rank} scale {scale:g}" for rank, scale in sorted(found))
        raise ValueError(f"all adapters must have one rank and one scale, got {shown}")
    rank, scale = found.pop()
    return rank, scale * rank
