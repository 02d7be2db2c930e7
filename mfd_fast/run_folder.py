"""The folder of a run: where each file is, and how networks are kept in it."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfd_fast.config import Settings
from mfd_fast.models import build_model
from mfd_fast.models.base import VelocityNetwork
from mfd_fast.settings_io import from_toml, to_toml
from mfd_fast.storage import read_json, read_tensors, write_json, write_tensors, write_text

RECORDED_PACKAGES = ("mfd_fast", "torch", "numpy", "safetensors", "scikit-learn", "scipy", "triton", "matplotlib")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run.

    ``settings.toml``, ``versions.json``, ``installed.json``; ``teacher.safetensors`` and ``student.safetensors`` with a
    ``.json`` that says how to build the network; ``adapters.json`` and ``teacher_weights.json`` where they say
    something; logs, ``checkpoints/``, ``samples/``, ``evaluation/``;
    ``metrics.json``, ``report.html``.
    """

    path: Path

    def teacher_checkpoints(self) -> Path:
        """Checkpoints of the teacher's training."""
        return self.path / "checkpoints" / "teacher"

    def distill_checkpoints(self) -> Path:
        """Checkpoints of the distillation."""
        return self.path / "checkpoints" / "distill"

    def write_settings(self, settings: Settings) -> None:
        """Keep the resolved settings and the versions of what computes with them, and of everything else installed."""
        write_text(self.path / "settings.toml", to_toml(settings))
        write_json(self.path / "versions.json", versions())
        write_json(self.path / "installed.json", installed())

    def read_settings(self) -> Settings:
        """The settings of this run.

        Raises:
            FileNotFoundError: there are none; the folder is not a run.
        """
        file = self.path / "settings.toml"
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no run folder {self.path}")
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} is not a run folder: it has no settings.toml")
        return from_toml(file.read_text(encoding="utf-8"))

    def write_network(self, role: str, tensors: dict[str, torch.Tensor], description: dict[str, Any]) -> None:
        """Keep the weights of ``role`` and how to build its network."""
        write_tensors(self.path / f"{role}.safetensors", tensors)
        write_json(self.path / f"{role}.json", description)

    def has_network(self, role: str) -> bool:
        """Whether `write_network` has finished for ``role``."""
        return (self.path / f"{role}.json").is_file() and (self.path / f"{role}.safetensors").is_file()

    def read_description(self, role: str) -> dict[str, Any]:
        """How to build the network of ``role``.

        Raises:
            FileNotFoundError: the run has no such network yet.
            ValueError: the file is damaged.
        """
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no run folder {self.path}")
        if not self.has_network(role):
            raise FileNotFoundError(f"{self.path} has no {role} yet ({role}.json and {role}.safetensors)")
        description = read_json(self.path / f"{role}.json")
        if not isinstance(description, dict):
            raise ValueError(f"{self.path / role}.json must hold an object, got {type(description).__name__}")
        return description

    def read_tensors(self, role: str) -> dict[str, torch.Tensor]:
        """The weights of ``role``."""
        return read_tensors(self.path / f"{role}.safetensors")

    def read_teacher(self, *, trust_code: bool = False) -> nn.Module:
        """The teacher with its weights; errors and ``trust_code`` as in `build_from_description`."""
        description, tensors = self.read_description("teacher"), self.read_tensors("teacher")
        return network_from_description(description, tensors, trust_code=trust_code)


def network_from_description(
    description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, trust_code: bool = False
) -> nn.Module:
    """A network of this package or of the user's factory with weights, in evaluation mode.

    Raises:
        ValueError: the weights do not fit, or as `build_from_description`.
    """
    return with_weights(build_from_description(description, tensors, trust_code=trust_code), tensors)


def build_from_description(
    description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, trust_code: bool = False
) -> nn.Module:
    """A new network of this package, or of the factory that the run folder names, for weights like ``tensors``.

    Args:
        description: as it lies in the run folder.
        tensors: the weights that come with it; a network that needs far more is not built.
        trust_code: import and call a factory; without it no code of others runs.

    Raises:
        ValueError: only the user's code can build it, or it is not trusted.
    """
    if "factory" in description:
        return _call_trusted(description["factory"], trust_code)
    if "class" in description:
        raise ValueError(
            f"only your code can build this run's {description['class']}: pass a module built as the teacher was "
            f"(load_student(run, network=...)); for commands distil with distill(..., factory='package.module:name')"
        )
    from mfd_fast.models.limits import model_for_weights

    return model_for_weights(description, tensors)


def _call_trusted(factory: Any, trusted: bool) -> nn.Module:
    """The module of a factory that a run folder names, if the user trusts it."""
    if not isinstance(factory, str):
        raise ValueError(f"factory must be a text package.module:name, got {type(factory).__name__}")
    if not trusted:
        raise ValueError(
            f"the network of this run is made by {factory!r}, and to make it that module must be imported, which runs "
            f"its code. Where you know it, as in a run of your own, pass --trust-code (in Python trust_code=True)"
        )
    from mfd_fast.user_code import call_factory

    return call_factory(factory)


def with_weights(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """``module`` ready for use: with these weights, frozen and in evaluation mode; ValueError if they do not fit."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the network: {error}") from error
    return module.requires_grad_(False).eval()


def build_from_settings(settings: Settings, sample_shape: tuple[int, ...], num_classes: int | None) -> VelocityNetwork:
    """A new network as the settings want it."""
    return build_model(settings.model.name, sample_shape, num_classes, **settings.model.options)


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    every = installed()
    named = {package: every[package] for package in RECORDED_PACKAGES if package in every}
    return {"python": platform.python_version(), **named}


@cache
def installed() -> dict[str, str]:
    """Version of every installed distribution, as it was when first asked."""
    found = {part.metadata["Name"] or "": part.version for part in reversed(list(metadata.distributions()))}
    return dict(sorted((name, version) for name, version in found.items() if name))
