"""Prompts of SANA: their padding, and several of them side by side as rows of equal length."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mfd_fast.types import Condition

Text = Mapping[str, Tensor]
"""What the blocks need of prompts: ``keys`` and ``values`` ``[R, blocks, heads, L, head_dim]``, and ``mask``
``[R, 1, 1, L]`` bool (True = attend) where there is one; R is the number of prompts or 1, shared by all rows."""


def cut_padding(condition: Condition, multiple: int = 1) -> dict[str, Any]:
    """``condition`` without the tokens at the end of its prompts that no row attends to: the same velocities for less.

    On a device nothing is cut, since the host would have to wait for the mask: call it where prompts are loaded.

    Args:
        condition: ``prompt_embeds`` ``[R, L, C]`` and, if tokens are padding, ``prompt_mask`` ``[R, L]``.
        multiple: lengths are multiples of it, up to L; few lengths need few recordings (``runner="captured"``).

    Raises:
        ValueError: a prompt without a single token to attend to.
    """
    mask = condition.get("prompt_mask")
    if mask is None or mask.device.type != "cpu":
        return dict(condition)
    used = mask != 0
    if not bool(used.any(1).all()):
        row = int((~used.any(1)).nonzero()[0])
        raise ValueError(f"prompt_mask must keep at least one token of every prompt, got none in row {row}")
    length = -(-(int(used.any(0).nonzero()[-1]) + 1) // multiple) * multiple
    return {**condition, "prompt_embeds": condition["prompt_embeds"][:, :length], "prompt_mask": mask[:, :length]}


class Prompts(NamedTuple):
    """Prompts of several conditions as rows of one batch."""

    embeds: Tensor
    """``[R, L, C]``."""
    mask: Tensor
    """``[R, L]`` bool."""
    rows: list[int]
    """Rows of each condition."""


def join_prompts(conditions: Sequence[Condition]) -> Prompts:
    """The prompts of all conditions, cut and then filled up to the length of the longest.

    Raises:
        ValueError: a condition that is not made of ``prompt_embeds`` and ``prompt_mask``.
    """
    embeds, masks = zip(*(_embeds_and_mask(cut_padding(condition)) for condition in conditions), strict=True)
    longest = max(part.shape[1] for part in embeds)
    return Prompts(
        torch.cat([pad(part, (0, 0, 0, longest - part.shape[1])) for part in embeds]),
        torch.cat([pad(mask, (0, longest - mask.shape[1])) for mask in masks]),
        [len(part) for part in embeds],
    )


def _embeds_and_mask(condition: Condition) -> tuple[Tensor, Tensor]:
    unknown = sorted(condition.keys() - {"prompt_embeds", "prompt_mask"})
    if unknown or "prompt_embeds" not in condition:
        raise ValueError(
            f"a condition of SANA must have prompt_embeds [B, L, C] and may have prompt_mask [B, L], "
            f"got {', '.join(condition) or 'nothing'}"
        )
    embeds, mask = condition["prompt_embeds"], condition.get("prompt_mask")
    check_prompts(embeds, mask)
    if mask is None:
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    return embeds, (mask != 0).expand(embeds.shape[:2])


def check_prompts(embeds: Tensor, mask: Tensor | None) -> None:
    """ValueError unless embeds are ``[R, L, C]`` and the mask, if there is one, ``[R, L]`` or ``[1, L]``."""
    if embeds.dim() != 3:
        raise ValueError(f"prompt_embeds must have shape [B, L, C], got {list(embeds.shape)}")
    if mask is not None and list(mask.shape) not in ([len(embeds), embeds.shape[1]], [1, embeds.shape[1]]):
        expected = list(embeds.shape[:2])
        raise ValueError(f"prompt_mask must have the shape {expected} of prompt_embeds, got {list(mask.shape)}")


def split_text(text: Text, rows: Sequence[int]) -> list[Text]:
    """The text of consecutive groups of ``rows`` prompts."""
    parts = {name: value.split(list(rows)) for name, value in text.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(len(rows))]


def plain_text(text: Text) -> Text:
    """``text`` in a form in which the compiler sees no difference between batches: one row where all rows are views of
    one, and without gradients no views, since it tells those apart by the size of what they were cut from.
    """
    once = {
        name: value[0][None] if value.shape[0] == 1 or value.stride(0) == 0 else value for name, value in text.items()
    }
    return once if torch.is_grad_enabled() else {name: value.data for name, value in once.items()}


def of_rows(texts: Sequence[Text], rows: Sequence[int], name: str, block: int | None = None) -> Tensor:
    """One tensor of the text, of one block, for all rows of the batch ``[B, ...]``: ``rows`` of each text."""
    picked = [text[name] if block is None else text[name][:, block] for text in texts]
    spread = [value.expand(count, *value.shape[1:]) for value, count in zip(picked, rows, strict=True)]
    return spread[0] if len(spread) == 1 else torch.cat(spread)
