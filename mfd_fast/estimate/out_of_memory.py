"""A GPU that ran out of memory, in words that help."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mfd_fast.config import DistillSettings
from mfd_fast.estimate.knobs import cheapest
from mfd_fast.estimate.plan import plan_from_settings


@contextmanager
def named_knobs(settings: DistillSettings, gpus: int) -> Iterator[None]:
    """Inside, an out-of-memory error names the cheapest ways to need less.

    Raises:
        torch.OutOfMemoryError: in place of the original, which is its cause.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        plan = plan_from_settings(settings, gpus)
        knobs = "; ".join(f"{knob.words} (costs {knob.price})" for knob in cheapest(plan))
        first = ". ".join(str(error).split(". ", 2)[:2])
        raise torch.OutOfMemoryError(
            f"{first}. Cheapest ways to need less: {knobs or 'a larger GPU'}. mfd-fast estimate shows where memory goes"
        ) from error
