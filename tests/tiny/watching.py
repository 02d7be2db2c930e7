"""What a piece of code asks torch for: the names of the functions, and those that make the host wait for a device."""

from typing import Any

from torch.overrides import TorchFunctionMode

READS = {"item", "tolist", "cpu", "numpy", "nonzero", "equal", "allclose"}
READS |= {"__bool__", "__int__", "__float__", "__index__"}


class Calls(TorchFunctionMode):
    """The names of all functions of torch, in order; a field may add marks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))
