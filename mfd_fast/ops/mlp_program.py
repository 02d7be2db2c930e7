"""MLP velocity fields as short lists of operations, which compiled code can run without Python.

A network describes itself once, in a method ``mlp_program(build)`` that follows its ``forward`` with the methods of a
`ProgramBuilder`. The description names parameters and never holds their values: those are read at each rollout.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Code(IntEnum):
    """What an operation does with its slots; the definition is in `evaluate_program`."""

    LINEAR = 0
    ACTIVATION = 1
    LAYER_NORM = 2
    FOURIER = 3
    INPUT = 4
    GATHER = 5
    MODULATE = 6
    ADD = 7
    MULTIPLY_ADD = 8
    COPY = 9


ACTIVATIONS = ("identity", "silu", "gelu", "gelu_tanh", "relu", "tanh")
"""Activations by the number that compiled code knows them by."""

_FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    functional.silu,
    functional.gelu,
    lambda x: functional.gelu(x, approximate="tanh"),
    functional.relu,
    torch.tanh,
)


_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
}

FIELDS = 8
"""Integers of an operation in a table: code, dst, src, other, a, b, weight, bias."""
_PLAIN = (Tensor, nn.Parameter)


class NotAnMLP(Exception):
    """Why a field cannot be run as a program."""


def activation_name(layer: nn.Module) -> str:
    """The name in `ACTIVATIONS` of an activation module; NotAnMLP for any other module."""
    if type(layer) is nn.GELU:
        return "gelu_tanh" if layer.approximate == "tanh" else "gelu"
    if type(layer) not in _MODULES:
        raise NotAnMLP(f"a layer is a {type(layer).__name__}, neither nn.Linear nor one of {', '.join(ACTIVATIONS)}")
    return _MODULES[type(layer)]


class Slot(NamedTuple):
    """A matrix with a row per sample. Slots of time do not depend on the state."""

    number: int
    width: int
    of_time: bool


class Place(NamedTuple):
    """Where a parameter or buffer is found, whatever tensor is there at the time."""

    holder: dict[str, Any]
    name: str
    shape: tuple[int, ...]


class Op(NamedTuple):
    """One operation: slots by number, offsets or numbers ``a`` and ``b``, and up to two tensors."""

    code: Code
    dst: int
    src: int = 0
    other: int = 0
    a: int = 0
    b: int = 0
    weight: Place | None = None
    bias: Place | None = None


class Input(NamedTuple):
    """A condition: rows ``[B or 1, width]`` in float32 (``rows`` is None), or an index ``[B or 1]`` into ``rows``."""

    name: str
    width: int
    rows: int | None
    default: int | None
    """The index that stands for a missing condition."""


@dataclass(frozen=True)
class Program:
    """A network: slot 0 is the state, slot 1 the time; time operations come first."""

    widths: tuple[int, ...]
    ops: tuple[Op, ...]
    time_ops: int
    output: int
    inputs: tuple[Input, ...]

    @cached_property
    def table(self) -> "array[int]":
        """`FIELDS` integers for each operation; the last two are for the addresses of its tensors."""
        return array("q", [field for op in self.ops for field in (*op[:6], 0, 0)])

    @cached_property
    def places(self) -> tuple[tuple[int, Place], ...]:
        """Where in the table the address of which tensor belongs."""
        found = (
            (FIELDS * (index + 1) - 2 + which, place)
            for index, op in enumerate(self.ops)
            for which, place in enumerate((op.weight, op.bias))
        )
        return tuple((index, place) for index, place in found if place is not None)

    @cached_property
    def slot_widths(self) -> "array[int]":
        """`widths` as compiled code reads it."""
        return array("q", self.widths)

    def addressed(self, device: torch.device) -> "array[int]":
        """The table with the addresses of the tensors that are in their places now.

        Raises NotAnMLP if one is not plain contiguous float32 memory of ``device`` in its shape.
        """
        table, on_cpu = self.table[:], device.type == "cpu"
        for index, (holder, name, shape) in self.places:
            tensor = holder[name]
            if (
                tensor.dtype is not torch.float32
                or tensor.shape != shape
                or type(tensor) not in _PLAIN
                or not tensor.is_contiguous()
                or not (tensor.is_cpu if on_cpu else tensor.device == device)
            ):
                raise NotAnMLP(
                    f"its {name} must be contiguous float32 of shape {shape} on {device}, "
                    f"got {type(tensor).__name__} in {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
                )
            table[index] = tensor.data_ptr()
        return table


@runtime_checkable
class DescribesItself(Protocol):
    """A field that fused rollouts can run: `mlp_program` says what its ``forward`` computes, step by step."""

    def mlp_program(self, build: "ProgramBuilder") -> Slot:
        """The slot of the velocity, which has as many features as the state."""
        ...


class ProgramBuilder:
    """Records a program. Every method returns the slot of its result.

    ``into`` names a slot that is not needed any more and may be overwritten. ``activation``, ``modulate`` and
    ``multiply_add`` change their first argument in place, ``add`` does where both arguments are of one kind.
    """

    def __init__(self, features: int) -> None:
        self._widths = [features, 1]
        self._time_ops: list[Op] = []
        self._state_ops: list[Op] = []
        self._inputs: list[Input] = []

    @property
    def state(self) -> Slot:
        """The state, flattened: slot 0."""
        return Slot(0, self._widths[0], False)

    @property
    def time(self) -> Slot:
        """The time, one number a row: slot 1."""
        return Slot(1, 1, True)

    def linear(self, source: Slot, layer: nn.Module, into: Slot | None = None) -> Slot:
        """``source @ weight.T + bias`` of an nn.Linear, and of that class alone."""
        if type(layer) is not nn.Linear:
            raise NotAnMLP(f"a layer is a {type(layer).__name__}, not an nn.Linear")
        if layer.in_features != source.width:
            raise NotAnMLP(f"a Linear takes {layer.in_features} features, it would get {source.width}")
        shape = (layer.out_features, layer.in_features)
        bias = None if layer.bias is None else Place(layer._parameters, "bias", shape[:1])
        target = self._target(layer.out_features, source.of_time, into)
        return self._record(Code.LINEAR, target, source, weight=Place(layer._parameters, "weight", shape), bias=bias)

    def activation(self, source: Slot, kind: str) -> Slot:
        """One of `ACTIVATIONS`, in place."""
        source = self._own(source)
        return self._record(Code.ACTIVATION, source, source, a=ACTIVATIONS.index(kind))

    def layer_norm(self, source: Slot, into: Slot | None = None) -> Slot:
        """Layer normalisation over the features without scale and shift, epsilon 1e-5."""
        return self._record(Code.LAYER_NORM, self._target(source.width, source.of_time, into), source)

    def fourier(self, time: Slot, holder: nn.Module, angular: str, phase: str) -> Slot:
        """``sin(time * angular + phase)`` with two buffers ``[n]`` of ``holder``."""
        width = holder._buffers[angular].shape[0]  # type: ignore[union-attr]
        places = (Place(holder._buffers, name, (width,)) for name in (angular, phase))
        return self._record(Code.FOURIER, self._target(width, True, None), time, weight=next(places), bias=next(places))

    def vector(self, name: str, width: int) -> Slot:
        """The condition ``name``, ``[B or 1, width]`` in float32."""
        self._inputs.append(Input(name, width, None, None))
        return self._record(Code.INPUT, self._target(width, True, None), a=len(self._inputs) - 1)

    def gather(self, name: str, holder: nn.Module, table: str, default: int) -> Slot:
        """Rows of the parameter ``table`` ``[rows, n]`` of ``holder``, chosen by the condition ``name``."""
        rows, width = holder._parameters[table].shape  # type: ignore[union-attr]
        self._inputs.append(Input(name, width, rows, default))
        place = Place(holder._parameters, table, (rows, width))
        target = self._target(width, True, None)
        return self._record(Code.GATHER, target, a=len(self._inputs) - 1, b=rows, weight=place)

    def modulate(self, source: Slot, other: Slot, scale_at: int, shift_at: int) -> Slot:
        """``source * (1 + scale) + shift`` in place; scale and shift are features of ``other`` from there on."""
        source = self._own(source)
        return self._record(Code.MODULATE, source, source, other=other, a=scale_at, b=shift_at)

    def add(self, first: Slot, second: Slot) -> Slot:
        """The sum."""
        if first.of_time and not second.of_time:
            first, second = second, first
        first = self._own(first)
        return self._record(Code.ADD, first, first, other=second)

    def multiply_add(self, total: Slot, first: Slot, second: Slot) -> Slot:
        """``total + first * second`` in place."""
        return self._record(Code.MULTIPLY_ADD, total, first, other=second)

    def concatenate(self, sources: Iterable[Slot]) -> Slot:
        """The features of all sources side by side."""
        sources = list(sources)
        of_time = all(source.of_time for source in sources)
        target = self._target(sum(source.width for source in sources), of_time, None)
        offset = 0
        for source in sources:
            self._record(Code.COPY, target, source, a=offset)
            offset += source.width
        return target

    def program(self, output: Slot) -> Program:
        """The finished program, whose velocity is in ``output``."""
        if output.width != self._widths[0] or output.of_time:
            raise NotAnMLP(f"the network returns {output.width} features for a state of {self._widths[0]}")
        ops = (*self._time_ops, *self._state_ops)
        return Program(tuple(self._widths), ops, len(self._time_ops), output.number, tuple(self._inputs))

    def _own(self, slot: Slot) -> Slot:
        """The slot, or a copy of state or time, which nothing may change."""
        return slot if slot.number > 1 else self.concatenate([slot])

    def _target(self, width: int, of_time: bool, into: Slot | None) -> Slot:
        if into is not None and (into.width, into.of_time) == (width, of_time):
            return into
        self._widths.append(width)
        return Slot(len(self._widths) - 1, width, of_time)

    def _record(
        self,
        code: Code,
        target: Slot,
        source: Slot | None = None,
        *,
        other: Slot | None = None,
        a: int = 0,
        b: int = 0,
        weight: Place | None = None,
        bias: Place | None = None,
    ) -> Slot:
        ops = self._time_ops if target.of_time else self._state_ops
        read, also = (0 if slot is None else slot.number for slot in (source, other))
        ops.append(Op(code, target.number, read, also, a, b, weight, bias))
        return target


def evaluate_program(program: Program, x: Tensor, t: Tensor, condition: Mapping[str, Tensor | None]) -> Tensor:
    """The definition: the velocity ``[n, F]`` at ``x`` ``[n, F]``, ``t`` ``[n]`` in plain torch."""
    slots: dict[int, Tensor] = {0: x, 1: t[:, None]}
    for op in program.ops:
        slots[op.dst] = _evaluate(op, program, slots, condition, len(x))
    return slots[program.output]


def _tensor(place: Place | None) -> Any:
    return None if place is None else place.holder[place.name]


def _evaluate(
    op: Op, program: Program, slots: dict[int, Tensor], condition: Mapping[str, Tensor | None], rows: int
) -> Tensor:
    src, other, width = slots.get(op.src), slots.get(op.other), program.widths[op.dst]
    weight, bias = (_tensor(place) for place in (op.weight, op.bias))
    if op.code in (Code.INPUT, Code.GATHER):
        given = program.inputs[op.a]
        value = condition.get(given.name)
        if op.code == Code.INPUT:
            assert value is not None
            return value.expand(rows, width)
        index = torch.tensor([given.default], device=weight.device) if value is None else value.long()
        return functional.embedding(index, weight).expand(rows, width)
    assert src is not None
    assert other is not None
    if op.code == Code.LINEAR:
        product: Tensor = functional.linear(src, weight, bias)
        return product
    if op.code == Code.ACTIVATION:
        return _FUNCTIONS[op.a](src)
    if op.code == Code.LAYER_NORM:
        return functional.layer_norm(src, [width])
    if op.code == Code.FOURIER:
        features: Tensor = (src * weight + bias).sin()
        return features
    if op.code == Code.MODULATE:
        return src * (1 + other[:, op.a : op.a + width]) + other[:, op.b : op.b + width]
    if op.code == Code.ADD:
        return src + other
    if op.code == Code.MULTIPLY_ADD:
        return slots[op.dst] + src * other
    joined = slots.get(op.dst, src.new_empty(rows, width)).clone()
    joined[:, op.a : op.a + src.shape[1]] = src
    return joined
