"""A network whose forward depends on what is no weight, and changes to it that a script may make between rollouts."""

from typing import Any

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """A module without weights."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


class OtherScale(Scale):
    """Looks the same from outside."""

    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * x


class Switched(nn.Module):
    """With adapters of which one is in use, as peft has them, and a function, a factor and a module to exchange."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.enter, self.leave = nn.Linear(7, 16), nn.Linear(16, 6)
            self.adapters = nn.ModuleDict({name: nn.Linear(7, 16) for name in ("first", "second")})
        self.active = ["first"]
        self.strengths = {"first": 1.0, "second": 1.0}
        self.factor = 1.0
        self.activation = torch.tanh
        self.scale = Scale()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        both = torch.cat([x, t[:, None]], 1)
        hidden = self.enter(both)
        for name in self.active:
            hidden = hidden + self.strengths[name] * self.adapters[name](both)
        return self.scale(self.factor * self.leave(self.activation(hidden)))


def other_adapter(network: Switched) -> None:
    network.active = ["second"]


def adapter_in_place(network: Switched) -> None:
    network.active.append("second")


def other_strength(network: Switched) -> None:
    network.strengths["first"] = 3.0


def other_factor(network: Switched) -> None:
    network.factor = 3.0


def other_function(network: Switched) -> None:
    network.activation = torch.relu


def other_module(network: Switched) -> None:
    network.scale = OtherScale()


def other_forward(network: Switched) -> None:
    network.scale.forward = lambda x: -x  # type: ignore[method-assign]


def adapter_added(network: Switched) -> None:
    network.adapters["third"] = nn.Linear(7, 16)
    network.strengths["third"] = 1.0
    network.active = ["third"]


def untied(network: Switched) -> None:
    """Weights that were one become two."""
    network.adapters["first"].weight = nn.Parameter(0.5 * network.enter.weight.detach())


def hooked(network: Switched) -> None:
    network.leave.register_forward_hook(lambda module, arguments, output: 2 * output)


CHANGES: tuple[Any, ...] = (
    *(other_adapter, adapter_in_place, other_strength, other_factor, other_function),
    *(other_module, other_forward, adapter_added, untied, hooked),
)


def switched(change: Any) -> Switched:
    """The network before ``change``."""
    network = Switched().eval()
    if change is untied:
        network.adapters["first"].weight = network.enter.weight
    return network
