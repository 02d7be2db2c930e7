"""Nothing is read back from the device inside the loop of fixed steps.

There is no device here, so what would make the host wait for one is looked for in the calls themselves.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from watching import READS, Calls

from mfd_fast import mean_velocity, mean_velocity_pair
from mfd_fast.closed_forms import Gaussian
from mfd_fast.models import build_model
from mfd_fast.models.lora import LoRARoles
from mfd_fast.solvers import SOLVERS

LAW = Gaussian([1.3, -0.4], [0.6, 1.7])
DISPATCHED_READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique"}


class _Dispatched(TorchDispatchMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def _reads_inside_the_loop(call: Callable[[Callable[[], None]], object]) -> list[str]:
    """What is read between the first and the last evaluation of the field."""
    calls = Calls()
    with calls, _Dispatched(calls.names):
        call(lambda: calls.names.append("FIELD"))
    marks = [place for place, name in enumerate(calls.names) if name == "FIELD"]
    assert len(marks) > 2
    inside = calls.names[marks[0] : marks[-1]]
    assert "mul" in inside, "the operations of the solver should have been seen"
    return [name for name in inside if name in READS | DISPATCHED_READS]


def _watched(mark: Callable[[], None]) -> Callable[..., Tensor]:
    def field(x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        mark()
        return LAW(x, t) + condition.get("push", torch.zeros_like(x))

    return field


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(5, 2), torch.tensor([1.0, 0.4, 0.3, 0.9, 0.0]), torch.tensor([0.0, 0.3, 0.3, 0.6, 1.0])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0], ids=["plain", "guided"])
@pytest.mark.parametrize("name", SOLVERS)
def test_fixed_steps_read_nothing(name: str, guidance_scale: float) -> None:
    kwargs: dict[str, Any] = {"steps": 6} if name == "bosh3" else {"step_size": 0.1}
    kwargs |= {"condition": {"push": torch.randn(5, 2)}, "negative_condition": {"push": torch.zeros(1, 2)}}
    reads = _reads_inside_the_loop(
        lambda mark: mean_velocity(_watched(mark), *_batch(), solver=name, guidance_scale=guidance_scale, **kwargs)
    )
    assert reads == []


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0], ids=["plain", "guided"])
def test_a_pair_reads_nothing(guidance_scale: float) -> None:
    roles = LoRARoles(build_model("mlp", (2,), 3, width=8, depth=1), rank=2, alpha=2.0)
    condition = {"label": torch.tensor([0, 1, 2, 0, 1])}

    def call(mark: Callable[[], None]) -> None:
        hook = roles.network.register_forward_pre_hook(lambda *_: mark())
        mean_velocity_pair(
            roles.teacher,
            roles.auxiliary,
            *_batch(),
            step_size=0.1,
            condition=condition,
            negative_condition={"label": torch.tensor([3])},
            guidance_scale=guidance_scale,
        )
        hook.remove()

    assert _reads_inside_the_loop(call) == []


@pytest.mark.parametrize("read", [lambda x: bool(x.sum() > 0), lambda x: x.tolist(), lambda x: x.sum().item()])
def test_a_read_would_be_noticed(read: Callable[[Tensor], object]) -> None:
    def call(mark: Callable[[], None]) -> None:
        inner = _watched(mark)

        def field(x: Tensor, t: Tensor) -> Tensor:
            velocity = inner(x, t)
            read(velocity)
            return velocity

        mean_velocity(field, *_batch(), step_size=0.1)

    assert _reads_inside_the_loop(call) != []
