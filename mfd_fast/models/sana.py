"""SANA (Xie et al. 2024, arXiv 2410.10629) as velocity fields: diffusers' `SanaTransformer2DModel` in our convention.

SANA predicts noise - data at the noise level sigma, which is the velocity at t = sigma here; the network is told
``1000 t`` times its own ``timestep_scale``. A flow shift belongs to the choice of times (`mfd_fast.intervals`, the grid
of `mfd_fast.Student`), never to the field.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfd_fast.models.lora import LoRARoles, RoleField
from mfd_fast.models.row_groups import RowSpans, merged_groups
from mfd_fast.models.sana_blocks import sana_block, text_heads
from mfd_fast.models.sana_text import Text, check_prompts, join_prompts, of_rows, plain_text, split_text
from mfd_fast.pipelines import stored_variant
from mfd_fast.types import Condition, ConditionGroup, RowGroup

Context = Callable[[], AbstractContextManager[None]]

TRAINING_TIMES = 1000
"""Times of SANA's schedulers run up to this number."""
RELEASED_TARGETS = ("to_q", "to_k", "to_v")
"""What the released script of Mean Flow Distillation adapts: queries, keys and values of both attentions."""


def load_transformer(path: Path | str, dtype: torch.dtype | None = None) -> nn.Module:
    """The transformer of a pipeline of SANA, or the transformer itself, from a folder; nothing is downloaded.

    Args:
        path: the pipeline's folder, or that of its transformer.
        dtype: of its weights (default: float32).

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        FileNotFoundError: there is no such transformer in the folder.
    """
    try:
        from diffusers import SanaTransformer2DModel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"SANA needs diffusers ({error}): pip install 'mfd_fast[sana]'") from error
    folder = Path(path)
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no transformer: there is no {folder / 'config.json'}")
    transformer: nn.Module = SanaTransformer2DModel.from_pretrained(
        folder, torch_dtype=dtype, variant=stored_variant(folder), local_files_only=True
    )
    return transformer.eval().requires_grad_(False)


def load_network(path: Path | str, dtype: torch.dtype | None = None) -> "SanaNetwork":
    """`load_transformer` as a velocity network."""
    return SanaNetwork(load_transformer(path, dtype))


class SanaNetwork(nn.Module):
    """The velocity of a SANA transformer: ``network(x, t, prompt_embeds=..., prompt_mask=...)``.

    ``x`` ``[B, C, H, W]`` latents as the pipeline denoises them, ``t`` ``[B]`` float32 in [0, 1], ``prompt_embeds``
    ``[B, L, E]``, ``prompt_mask`` ``[B, L]`` (nonzero = attend); prompts may have one row, shared by all. Inside a
    rollout keys and values of the text are computed once (`mfd_fast.types.PreparesConditions`) and passed as ``text``.

    The transformer is used as it is, never copied or changed. `reference` is its own forward.

    Args:
        transformer: a `diffusers.SanaTransformer2DModel`.
        checkpoint_blocks: in training, keep only the input of every block and compute the rest again in backward.

    Raises:
        TypeError: not such a transformer.
        ValueError: one that also takes guidance as an input, or predicts more than a velocity.
    """

    time_range = (0.0, 1.0)
    pipeline = "sana"
    """Name in `mfd_fast.pipelines.PIPELINES`."""

    def __init__(self, transformer: nn.Module, *, checkpoint_blocks: bool = False) -> None:
        super().__init__()
        check_transformer(transformer)
        self.transformer = transformer
        self.checkpoint_blocks = checkpoint_blocks
        config = cast(Any, transformer).config
        self.sample_shape = (config.in_channels, config.sample_size, config.sample_size)
        """Of one latent at the size the transformer was made for; others work too."""
        self.time_scale = TRAINING_TIMES * config.timestep_scale
        self.recompute_context: Context = nullcontext
        """What blocks need around them when checkpointing computes them again."""

    @property
    def _net(self) -> Any:
        return self.transformer

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        prompt_embeds: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        *,
        text: Text | Sequence[Text] | None = None,
        text_rows: Sequence[int] = (),
    ) -> Tensor:
        """The velocity ``[B, C, H, W]``.

        ``text`` is what `prepare_conditions` made of the prompts, or a list of that for consecutive groups of rows;
        ``text_rows`` are then the rows of all groups but the first.
        """
        if text is None:
            if prompt_embeds is None:
                raise ValueError("SANA needs prompt_embeds [B, L, C] in its condition")
            text = self.text(prompt_embeds, prompt_mask, len(x))
        texts = [text] if isinstance(text, Mapping) else list(text)
        rows = [x.shape[0] - sum(text_rows), *text_rows]
        net = self._net
        h = net.patch_embed(x)
        modulation, embedded = net.time_embed(t * self.time_scale, batch_size=len(x), hidden_dtype=h.dtype)
        h = self._blocks(h, modulation.unflatten(1, (6, -1)), self._grid(x), texts, rows)
        return self._picture(net.proj_out(net.norm_out(h, embedded, net.scale_shift_table)), x)

    def reference(self, x: Tensor, t: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
        """The definition: the transformer's own forward, for prompts with as many rows as ``x``."""
        velocity: Tensor = self.transformer(
            x,
            encoder_hidden_states=prompt_embeds.to(self._text_dtype()),
            timestep=t * self.time_scale,
            encoder_attention_mask=prompt_mask,
            return_dict=False,
        )[0]
        return velocity

    def text(self, prompt_embeds: Tensor, prompt_mask: Tensor | None, rows: int) -> Text:
        """Keys and values of prompts, for a batch of ``rows`` rows (prompts with one row are repeated)."""
        check_prompts(prompt_embeds, prompt_mask)
        if len(prompt_embeds) not in (1, rows):
            raise ValueError(f"prompt_embeds must have {rows} rows, as x, or 1, got shape {list(prompt_embeds.shape)}")
        net = self._net
        embeds = prompt_embeds.to(self._text_dtype()).expand(rows, -1, -1)
        tokens = net.caption_norm(net.caption_projection(embeds))
        heads = [text_heads(block.attn2, tokens) for block in net.transformer_blocks]
        text = {
            name: torch.stack(part, 1) for name, part in zip(("keys", "values"), zip(*heads, strict=True), strict=True)
        }
        if prompt_mask is not None:
            text["mask"] = (prompt_mask != 0).expand(rows, -1)[:, None, None]
        return text

    def prepare_conditions(self, groups: Sequence[ConditionGroup]) -> list[Condition]:
        """Keys and values of all prompts; see `mfd_fast.types.PreparesConditions`."""
        return self.prepare([condition for _, condition in groups], lambda rows: nullcontext())

    def prepare(
        self, conditions: Sequence[Condition], around: Callable[[list[int]], AbstractContextManager[None]]
    ) -> list[Condition]:
        """The text of ``conditions``, computed as one batch inside ``around(rows of each)``."""
        if all("text" in condition for condition in conditions):
            return list(conditions)
        prompts = join_prompts(conditions)
        with around(prompts.rows):
            text = self.text(prompts.embeds, prompts.mask, len(prompts.embeds))
        return [{"text": part} for part in split_text(text, prompts.rows)]

    def products(self) -> list[nn.Module]:
        """The matrix products of the blocks, 97 of 100 weights (`mfd_fast.models.low_precision`)."""
        blocks = self._net.transformer_blocks
        linears = [part for part in blocks.modules() if type(part) is nn.Linear]
        return [*linears, *(conv for block in blocks for conv in (block.ff.conv_inverted, block.ff.conv_point))]

    def _blocks(
        self, h: Tensor, modulation: Tensor, grid: tuple[int, int], texts: Sequence[Text], rows: Sequence[int]
    ) -> Tensor:
        mask = of_rows(texts, rows, "mask") if all("mask" in text for text in texts) else None
        checkpointed = self.checkpoint_blocks and torch.is_grad_enabled()
        for index, block in enumerate(self._net.transformer_blocks):
            key, value = (of_rows(texts, rows, name, index) for name in ("keys", "values"))
            arguments = (h, modulation, grid, key, value, mask)
            if checkpointed:
                contexts = partial(_contexts, self.recompute_context)
                h = checkpoint(partial(sana_block, block), *arguments, use_reentrant=False, context_fn=contexts)
            else:
                h = sana_block(block, *arguments)
        return h

    def _grid(self, x: Tensor) -> tuple[int, int]:
        size = self._net.config.patch_size
        return x.shape[2] // size, x.shape[3] // size

    def _picture(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Tokens ``[B, N, size^2 C]`` as a picture ``[B, C, H, W]``."""
        size = self._net.config.patch_size
        patches = tokens.unflatten(1, self._grid(x)).unflatten(-1, (size, size, -1))  # [B, h, w, size, size, C]
        picture: Tensor = patches.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
        return picture

    def _text_dtype(self) -> torch.dtype:
        table: Tensor = self._net.scale_shift_table  # no Linear, which an adapter may stand in for
        return table.dtype


def check_transformer(transformer: nn.Module) -> None:
    """Raise unless this is a transformer of SANA that predicts a velocity and nothing else."""
    if not hasattr(transformer, "config") or not hasattr(transformer, "caption_projection"):
        raise TypeError(f"transformer must be a diffusers SanaTransformer2DModel, got {type(transformer).__name__}")
    config = cast(Any, transformer).config
    if config.guidance_embeds:
        raise ValueError("this transformer takes guidance as an input (SANA-Sprint): it is not a velocity field")
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"the transformer must predict as many channels as it gets, got {config.in_channels} in and "
            f"{config.out_channels} out"
        )


def _contexts(again: Context) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpointed forward: none the first time."""
    return nullcontext(), again()


class SanaField(RoleField):
    """A role of `SanaRoles`: rows of several roles run as one batch, their text computed once in a rollout."""

    @property
    def backbone(self) -> "SanaRoles":
        """What fields must share to be evaluated together."""
        return cast(SanaRoles, self._backbone)

    def prepare_conditions(self, groups: Sequence[ConditionGroup]) -> list[Condition]:
        """Keys and values of all prompts, each by its own role; see `mfd_fast.types.PreparesConditions`."""
        return self.backbone.prepare(groups)

    def with_network(self, network: Callable[..., Tensor]) -> "SanaField":
        """The same role computed by ``network``, a copy of the present one (`mfd_fast.types.OnNetwork`)."""
        return SanaField(self.backbone, self.role, network)

    def evaluate_groups(self, groups: list[RowGroup]) -> list[Tensor]:
        """Velocities of groups of rows, each for its own field of this backbone, from one forward."""
        texts: list[Any] = [group.condition.get("text") for group in groups]
        if len(groups) == 1 or not _fit_together(texts):
            return super().evaluate_groups(groups)
        rows = [group.x.shape[0] for group in groups]
        roles = [self.backbone.role_of(group) for group in groups]
        x, t = torch.cat([group.x for group in groups]), torch.cat([group.t for group in groups])
        condition = {"text": [plain_text(text) for text in texts], "text_rows": tuple(rows[1:])}
        velocity = self.network(x, t, condition, *merged_groups(list(zip(roles, rows, strict=True))))
        return list(torch.split(velocity, rows))


def _fit_together(texts: Sequence[Any]) -> bool:
    """Whether these are texts of equal length, which can be rows of one batch."""
    if not all(isinstance(text, Mapping) for text in texts):
        return False
    first = texts[0]
    return all(text.keys() == first.keys() and text["keys"].shape[3] == first["keys"].shape[3] for text in texts)


class SanaRoles(LoRARoles):
    """Teacher, auxiliary and student as one frozen SANA backbone with a low-rank adapter for each trained role.

    ``roles.teacher``, ``roles.auxiliary`` and ``roles.student`` are velocity fields; see `SanaNetwork` for their inputs
    and `LoRARoles` for all else. Names of weights are those of the transformer behind ``transformer.``.

    Args:
        transformer: a `diffusers.SanaTransformer2DModel`, or a `SanaNetwork` around it.
        rank: rank of the adapters.
        lora_alpha: the adapters are scaled by ``lora_alpha / rank``.
        targets: Linears to adapt; the default is the released script's.
        roles: names of the trained roles.
        seed: of the initial adapters, which change nothing yet.
        checkpoint_blocks: see `SanaNetwork`.
    """

    module: SanaNetwork
    network: SanaNetwork

    def __init__(
        self,
        transformer: nn.Module,
        *,
        rank: int = 64,
        lora_alpha: float = 64,
        targets: Sequence[str] | None = RELEASED_TARGETS,
        roles: Sequence[str] = ("auxiliary", "student"),
        seed: int = 0,
        checkpoint_blocks: bool = False,
    ) -> None:
        network = transformer if isinstance(transformer, SanaNetwork) else SanaNetwork(transformer)
        super().__init__(network, rank=rank, alpha=lora_alpha, targets=targets, roles=roles, seed=seed)
        self.network.checkpoint_blocks = checkpoint_blocks or network.checkpoint_blocks
        # Blocks are computed again long after a call, and need to know then whose rows were whose.
        self.network.recompute_context = partial(SameRows, self.rows)

    @property
    def teacher(self) -> SanaField:
        """The transformer as it is."""
        return SanaField(self, None)

    def field(self, role: str) -> SanaField:
        """The field of a role; ValueError when there is no such role."""
        self._check_role(role)
        return SanaField(self, role)

    def prepare(self, groups: Sequence[ConditionGroup]) -> list[Condition]:
        """Keys and values of all prompts, each by the role of its field.

        Raises:
            ValueError: a field of another backbone.
        """
        fields = [field for field, _ in groups]
        if not all(isinstance(field, RoleField) and field.backbone is self for field in fields):
            raise ValueError(f"prepare got a field of another backbone: {fields!r}")
        roles = [cast(RoleField, field).role for field in fields]
        conditions = [condition for _, condition in groups]
        return self.network.prepare(conditions, lambda rows: Assigned(self.rows, list(zip(roles, rows, strict=True))))


class Assigned:
    """A context in which the rows of a batch belong to these groups of (role, rows)."""

    def __init__(self, rows: RowSpans, groups: Sequence[tuple[str | None, int]]) -> None:
        self.rows, self.groups = rows, groups

    def __enter__(self) -> None:
        self.rows.assign(self.groups)

    def __exit__(self, *error: object) -> None:
        self.rows.clear()


class SameRows:
    """A context in which rows belong to the roles that they belong to when it is made; it can be entered again."""

    def __init__(self, rows: RowSpans) -> None:
        self.rows, self.spans = rows, rows.spans

    def __enter__(self) -> None:
        self.rows.spans = self.spans

    def __exit__(self, *error: object) -> None:
        self.rows.clear()
