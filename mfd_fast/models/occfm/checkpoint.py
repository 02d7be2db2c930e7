"""Weights of the transition model from a checkpoint that OccFM released or wrote, read without running anything."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from mfd_fast.torch_files import read_torch_file

PART = "transition_model."
PREFIXES = ("module.", "model.", "_orig_mod.")
"""What training frameworks put before names: data parallel, Lightning and averaging wrappers, torch.compile."""
SECTIONS = ("ema_model", "state_dict")
"""Weights in a checkpoint file, the averaged ones first: they are what OccFM evaluates with ``--use_ema``."""


class LoadReport(NamedTuple):
    """What was read from a checkpoint."""

    section: str
    """``ema_model``, ``state_dict``, or "" for a file that holds nothing but weights."""
    left_over: list[str]
    """Names of the file that belong to other parts of OccFM (compressor, counters)."""


def load_transition_weights(network: nn.Module, path: Path | str, section: str | None = None) -> LoadReport:
    """Copy the transition model's weights of an OccFM ``.ckpt`` into ``network``, a `TransitionModel`.

    Args:
        network: gets the weights; unchanged when the file does not fit.
        path: the file. Only tensors and plain values are read from it, whatever else it names is refused.
        section: ``ema_model`` or ``state_dict``; None takes the first of them that is there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, has no transition model, or has missing, unexpected or wrongly shaped weights,
            all of which are named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    weights, chosen = _section(_read(path), section, path)
    mine, left_over = _split(weights)
    if not mine:
        names = ", ".join(list(weights)[:3]) or "none"
        raise ValueError(f"{path} holds no transition model: no name in it begins with {PART!r} (names: {names})")
    own = network.state_dict()
    problems = [f"missing {name}" for name in own if name not in mine]
    problems += [f"unexpected {name}" for name in mine if name not in own]
    problems += [
        f"{name} has shape {list(mine[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in mine and mine[name].shape != own[name].shape
    ]
    problems += [f"{name} is of type {value.dtype}" for name, value in mine.items() if not value.is_floating_point()]
    problems += [f"{name} holds numbers that are not finite" for name, value in mine.items() if not _finite(value)]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{path} does not fit the model: {shown}")
    network.load_state_dict(mine)
    return LoadReport(chosen, left_over)


def read_weights(path: Path, section: str | None = None) -> dict[str, Tensor]:
    """All weights of an OccFM ``.ckpt`` by their names without framework prefixes; errors as above."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    return _section(_read(path), section, path)[0]


def _read(path: Path) -> Mapping[str, Any]:
    content = read_torch_file(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold named weights, it holds a {type(content).__name__}")
    return content


def _section(content: Mapping[str, Any], section: str | None, path: Path) -> tuple[dict[str, Tensor], str]:
    """Weights by their names without what frameworks put before them, and the section they are from."""
    present = [name for name in SECTIONS if isinstance(content.get(name), Mapping)]
    if section is not None and section not in present:
        raise ValueError(f"{path} has no section {section!r} with weights; it has {', '.join(present) or 'none'}")
    chosen = section or (present[0] if present else "")
    weights = content[chosen] if chosen else content
    tensors = {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    bare: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if _bare(name) in bare:
            raise ValueError(f"{path} holds {_bare(name)} twice, also as {name}: which one to take is not said")
        bare[_bare(name)] = value
    return bare, chosen


def _split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The transition model's weights by their own names, and the names of everything else."""
    if not any(name.startswith(PART) for name in weights):
        whole = "init_conv.weight" in weights
        return (dict(weights), []) if whole else ({}, list(weights))
    mine = {name.removeprefix(PART): value for name, value in weights.items() if name.startswith(PART)}
    return mine, [name for name in weights if not name.startswith(PART)]


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _bare(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name
