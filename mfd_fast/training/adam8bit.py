"""AdamW with moments of 8 bits (Dettmers et al. 2022, arXiv 2110.02861), by a library that has it.

Its moments take two bytes a weight in place of eight. The libraries keep them in forms of their own, which checkpoints
hold as they are: a run goes on with the library it began with.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.config import OptimizerSettings

PROBED = 4096
"""Weights from which on both libraries use 8 bits."""


class NoLibraryError(Exception):
    """A library that cannot be used here, and why."""


def make_adamw8bit(parameters: Sequence[nn.Parameter], settings: OptimizerSettings) -> tuple[Any, str, str | None]:
    """An optimiser, the name of what it is, and a sentence if it is not what was asked for.

    bitsandbytes is tried first, then torchao; where neither works, torch's AdamW with float32 moments.
    """
    problems = []
    for name, make in LIBRARIES.items():
        try:
            return make(parameters, settings), name, None
        except NoLibraryError as error:
            problems.append(f"{name}: {error}")
    words = f"adamw8bit is not to be had here ({'; '.join(problems)}): AdamW with float32 moments is used, which take "
    taken = 8 * sum(parameter.numel() for parameter in parameters) / 2**20
    optimizer = torch.optim.AdamW(parameters, **adam_options(settings), fused=True)
    return optimizer, "adamw", f"{words}{taken:.0f} MiB; pip install bitsandbytes"


def adam_options(settings: OptimizerSettings) -> dict[str, Any]:
    """The settings as torch and the libraries call them."""
    return {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def _bitsandbytes(parameters: Sequence[nn.Parameter], settings: OptimizerSettings) -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # a library for another CUDA fails in its own ways
        raise NoLibraryError(f"cannot be imported ({type(error).__name__})") from error
    probe = nn.Parameter(torch.zeros(PROBED, device=parameters[0].device))
    probe.grad = torch.zeros_like(probe)
    try:
        AdamW8bit([probe], lr=1e-3).step()
    except Exception as error:  # it finds out in its first step that it lacks a kernel
        raise NoLibraryError(f"does not work on {probe.device.type}") from error
    return AdamW8bit(parameters, **adam_options(settings))


def _torchao(parameters: Sequence[nn.Parameter], settings: OptimizerSettings) -> Any:
    try:
        from torchao.optim import AdamW8bit
    except Exception as error:
        raise NoLibraryError(f"cannot be imported ({type(error).__name__})") from error
    return AdamW8bit(parameters, **adam_options(settings))


LIBRARIES = {"bitsandbytes": _bitsandbytes, "torchao": _torchao}


def flatten(entry: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the other values in an optimiser's state of one weight, by ``NAME`` or ``NAME/PART``."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in entry.items():
        parts = value if isinstance(value, Mapping) else _inner(value)
        if parts is None:
            (tensors if isinstance(value, Tensor) else others)[name] = value
            continue
        inner_tensors, inner_others = flatten(parts)
        tensors |= {f"{name}/{part}": inner for part, inner in inner_tensors.items()}
        others |= {f"{name}/{part}": inner for part, inner in inner_others.items()}
    return tensors, others


def unflatten(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> dict[str, Any]:
    """What `flatten` took apart."""
    entry: dict[str, Any] = {}
    for path, value in {**tensors, **others}.items():
        name, _, part = path.partition("/")
        if part:
            entry.setdefault(name, {})[part] = value
        else:
            entry[name] = value
    return {name: _whole(name, value) for name, value in entry.items()}


def _inner(value: Any) -> dict[str, Tensor] | None:
    """The parts of a moment of torchao, which is a tensor with codes and scales inside."""
    if not (isinstance(value, Tensor) and hasattr(value, "codes") and hasattr(value, "qmap")):
        return None
    inner: Any = value
    return {"codes": inner.codes, "scale": inner.scale, "qmap": inner.qmap}


def _whole(name: str, value: Any) -> Any:
    if not (isinstance(value, dict) and value.keys() == {"codes", "scale", "qmap"}):
        return value
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(value["codes"], value["scale"], value["qmap"], name == "exp_avg")
