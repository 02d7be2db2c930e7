"""Read a pickle of numpy arrays, containers and scalars without executing it.

The file is only taken apart into its instructions (`pickletools.genops`, which runs nothing). A machine of the few
instructions that such a pickle consists of puts them together to plain values; any other instruction, and any name but
those that numpy's arrays mention, is refused. numpy itself sees nothing but checked bytes. What is built is not larger
than the file, and no container that came from the file is hashed or shown.
"""

import pickletools
from collections.abc import Callable
from typing import IO, Any, BinaryIO

from mfd_fast.data.plain_arrays import Array, Inert, Refused, Type, array_from_buffer, encode, scalar

_BROKEN = (ValueError, LookupError, TypeError, UnicodeError, RecursionError, OverflowError, MemoryError)
_REPORT_EVERY = 1 << 16
"""Instructions between calls of ``progress``."""


def read_plain_pickle(stream: BinaryIO, progress: Callable[[int], None] | None = None) -> Any:
    """What a pickle of any protocol holds: dicts, lists, tuples, sets, plain scalars and numpy arrays of those.

    Args:
        stream: the pickle.
        progress: is told now and then how many bytes have been read.

    Raises:
        ValueError: the pickle asks for anything else, is cut off, or describes an array wrongly; of a list the message
            says at which entry.
    """
    machine = _Machine()
    try:
        return _resolve(machine.run(stream, progress), {})
    except _BROKEN as error:
        what = f"{error or type(error).__name__}{machine.place()}"
        raise ValueError(f"not a readable pickle of arrays: {what}") from error


def check_keys(stream: IO[bytes]) -> None:
    """Look over a pickle that another restricted reader will read: keys and members of sets must be texts or numbers.

    Tuples in tuples, each twice in the next, would take for ever to be hashed. What the pickle calls is left blank.

    Raises:
        ValueError: other keys, or no pickle.
    """
    try:
        _Outline().run(stream, None)
    except _BROKEN as error:
        raise ValueError(f"not a readable pickle: {error or type(error).__name__}") from error


def _ndarray(*_: Any) -> Any:
    raise Refused("numpy.ndarray is not called in a pickle of arrays")


def _empty_bytes() -> bytes:
    return b""


def _set(items: Any) -> set[Any]:
    if not isinstance(items, list):
        raise Refused("a set is made of a list")
    return set(_scalars(items))


_ALLOWED: dict[str, Callable[..., Any]] = {
    "numpy dtype": Type,
    "numpy ndarray": _ndarray,
    "_codecs encode": encode,
    # How old protocols write b"" and sets.
    "__builtin__ bytes": _empty_bytes,
    "__builtin__ set": _set,
}
for _module in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_module}.multiarray _reconstruct"] = Array
    _ALLOWED[f"{_module}.multiarray scalar"] = scalar
    _ALLOWED[f"{_module}.numeric _frombuffer"] = array_from_buffer


class _Name(Inert):
    """Stands in for an allowed function or class."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


_MARK = object()
_VALUES = frozenset(
    (
        *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS, _GETS = frozenset(("PUT", "BINPUT", "LONG_BINPUT")), frozenset(("GET", "BINGET", "LONG_BINGET"))


class _Machine:
    """The stack and the memory that the instructions work on."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memory: dict[int, Any] = {}
        self._steps: dict[str, Callable[[], None]] = {
            "EMPTY_DICT": lambda: self._stack.append({}),
            "EMPTY_LIST": lambda: self._stack.append([]),
            "EMPTY_TUPLE": lambda: self._stack.append(()),
            "EMPTY_SET": lambda: self._stack.append(set()),
            "MARK": lambda: self._stack.append(_MARK),
            "TUPLE": lambda: self._stack.append(tuple(self._since_mark())),
            "LIST": lambda: self._stack.append(self._since_mark()),
            "DICT": lambda: self._stack.append(_pairs(self._since_mark())),
            "FROZENSET": lambda: self._stack.append(frozenset(_scalars(self._since_mark()))),
            "APPEND": lambda: self._grow(list, [self._stack.pop()]).extend(self._grown),
            "APPENDS": lambda: self._grow(list, self._since_mark()).extend(self._grown),
            "ADDITEMS": lambda: self._grow(set, _scalars(self._since_mark())).update(self._grown),
            "SETITEM": lambda: self._grow(dict, self._pop(2)).update(_pairs(self._grown)),
            "SETITEMS": lambda: self._grow(dict, self._since_mark()).update(_pairs(self._grown)),
            "REDUCE": self._reduce,
            "BUILD": self._build,
            "MEMOIZE": lambda: self._memory.__setitem__(len(self._memory), self._stack[-1]),
            "PROTO": lambda: None,
            "FRAME": lambda: None,
        }
        self._grown: list[Any] = []

    def run(self, stream: IO[bytes], progress: Callable[[int], None] | None) -> Any:
        """The value that the pickle describes."""
        for number, (code, argument, position) in enumerate(pickletools.genops(stream)):
            name = code.name
            if name in _VALUES:
                self._stack.append(argument)
            elif name in self._steps:
                self._steps[name]()
            elif name in _PUTS:
                self._memory[int(argument or 0)] = self._stack[-1]
            elif name in _GETS:
                self._stack.append(self._memory[int(argument or 0)])
            elif name in _TUPLES:
                self._stack.append(tuple(self._pop(_TUPLES[name])))
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                self._stack.append(self._named(argument if name == "GLOBAL" else " ".join(self._pop(2))))
            elif name == "STOP":
                return self._stack.pop()
            else:
                raise Refused(f"the instruction {name} has no place in a pickle of arrays")
            if progress is not None and number % _REPORT_EVERY == 0:
                progress(position or 0)
        raise Refused("it has no end")

    def place(self) -> str:
        """Where in a list of entries the machine stopped, in words; nothing for other pickles."""
        if not self._stack or type(self._stack[0]) is not list:
            return ""
        # Entries lie above a mark until many of them join the list; above a second mark are the parts of one.
        number, waiting = len(self._stack[0]), self._stack[2:]
        if len(self._stack) > 1 and self._stack[1] is _MARK:
            parts = next((i for i, value in enumerate(waiting) if value is _MARK), None)
            number += len(waiting) if parts is None else max(0, parts - 1)
        return f" (at entry {number})"

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise Refused("a value is missing")
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return taken

    def _since_mark(self) -> list[Any]:
        place = len(self._stack) - 1
        while place >= 0 and self._stack[place] is not _MARK:
            place -= 1
        if place < 0:
            raise Refused("a mark is missing")
        taken = self._stack[place + 1 :]
        del self._stack[place:]
        return taken

    def _grow(self, kind: type[Any], values: list[Any]) -> Any:
        """The container on the stack, if it is of this kind; ``values`` are kept for it."""
        if type(self._stack[-1]) is not kind:
            raise Refused(f"only a {kind.__name__} takes what a {kind.__name__} is made of")
        self._grown = values
        return self._stack[-1]

    def _named(self, name: Any) -> Any:
        """What stands in for a function or class."""
        if name not in _ALLOWED:
            raise Refused(f"the pickle asks for {str(name).replace(' ', '.')}, which is refused")
        return _Name(_ALLOWED[name])

    def _reduce(self) -> None:
        function, arguments = self._pop(2)
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise Refused("something is called that is no function, or with something that is no tuple")
        self._stack.append(function.function(*arguments))

    def _build(self) -> None:
        state = self._stack.pop()
        if not isinstance(self._stack[-1], Array | Type):
            raise Refused("only an array or its type has a state")
        self._stack[-1].set_state(state, lambda value: _resolve(value, {}))


class _Blank(Inert):
    """Stands in for anything that a pickle calls or makes."""

    def __init__(self, *_: Any) -> None:
        pass

    extend = update = __init__


def _hashing(items: Any = (), *_: Any) -> _Blank:
    """Stands in for the classes that hash what they are given."""
    if not isinstance(items, dict):
        _scalars(list(items))
    return _Blank()


class _Outline(_Machine):
    """The machine for pickles of which only the keys are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self._steps |= {"BINPERSID": lambda: self._blank(1), "NEWOBJ": lambda: self._blank(2)}

    def _blank(self, taken: int) -> None:
        self._pop(taken)
        self._stack.append(_Blank())

    def _build(self) -> None:
        self._stack.pop()

    def _named(self, name: Any) -> _Name:
        return _Name(_hashing if str(name).rpartition(" ")[2] in _HASHING else _Blank)

    def _grow(self, kind: type[Any], values: list[Any]) -> Any:
        self._grown = values
        return self._stack[-1] if isinstance(self._stack[-1], _Blank) else super()._grow(kind, values)


_HASHING = frozenset(("OrderedDict", "Counter", "dict", "set", "frozenset"))


def _scalars(values: list[Any]) -> list[Any]:
    """``values`` if each can be hashed at no cost."""
    if not all(value is None or isinstance(value, str | bytes | int | float) for value in values):
        raise Refused("keys and members of sets are texts or numbers")
    return values


def _pairs(values: list[Any]) -> dict[Any, Any]:
    """A dictionary of keys and values in turn."""
    if len(values) % 2:
        raise Refused("a key of a dictionary has no value")
    return dict(zip(_scalars(values[::2]), values[1::2], strict=True))


def _resolve(value: Any, known: dict[int, Any]) -> Any:
    """``value`` with arrays in place of what describes them; containers met twice are resolved once."""
    if isinstance(value, Array):
        return value.plain()
    if isinstance(value, Inert) or value is _MARK:
        raise Refused("a name, a type or a mark stands where a value should be")
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) not in known:
        known[id(value)] = None  # met again before it is finished: a container inside itself
        if isinstance(value, dict):
            known[id(value)] = {key: _resolve(item, known) for key, item in value.items()}
        else:
            known[id(value)] = type(value)(_resolve(item, known) for item in value)
    if known[id(value)] is None:
        raise Refused("a container holds itself")
    return known[id(value)]
