"""Reader of pickled token rows that runs nothing: no import, no call, whatever the pickle says.

The opcodes are followed on a stack of our own.  Only integers, texts, bytes, tuples, lists and
integer NumPy arrays in the exact form in which NumPy pickles them become values; the names that
this form needs stand in a table, and every other name ends the reading.  Knows nothing of what a
row means.
"""

import enum
import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.errors import DataError

MAX_BYTES = 1 << 20
"""A longer row is refused; the original's have 9 kB."""
MAX_OPCODES = 1 << 16
"""Bounds stack, memo and time."""
MAX_ITEMS = 1 << 16
"""Values in the result, counted at each place where they stand."""
MAX_NESTING = 8
MAX_DIMENSIONS = 4

Array = NDArray[np.signedinteger[Any] | np.unsignedinteger[Any]]


class _Known(enum.Enum):
    """What the names that may occur stand for.  They are marks: nothing is looked up or called."""

    RECONSTRUCT = enum.auto()
    FROM_BUFFER = enum.auto()
    SCALAR = enum.auto()
    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    ENCODE = enum.auto()
    BYTES = enum.auto()


_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _Known.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _Known.RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _Known.FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _Known.FROM_BUFFER,
    ("numpy.core.multiarray", "scalar"): _Known.SCALAR,
    ("numpy._core.multiarray", "scalar"): _Known.SCALAR,
    ("numpy", "ndarray"): _Known.NDARRAY,
    ("numpy", "dtype"): _Known.DTYPE,
    # How protocols 0 to 2 write bytes, and how they write no bytes.
    ("_codecs", "encode"): _Known.ENCODE,
    ("builtins", "bytes"): _Known.BYTES,
    ("__builtin__", "bytes"): _Known.BYTES,
}
_INTEGER_TYPE = re.compile(r"[iu][1248]")
_DECIMAL = re.compile(rb"-?(0|[1-9][0-9]*)L?\n")
_BOOL = re.compile(rb"0[01]\n")

_TEXT_NUMBERS = {"INT", "LONG", "PUT", "GET"}
_LITERALS = {
    *("NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OTHER_KINDS = {
    **dict.fromkeys(("FLOAT", "BINFLOAT"), "a float"),
    **dict.fromkeys(("DICT", "EMPTY_DICT"), "a dict"),
    **dict.fromkeys(("EMPTY_SET", "FROZENSET"), "a set"),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), "a text of Python 2"),
    **dict.fromkeys(("PERSID", "BINPERSID"), "a reference to another file"),
    **dict.fromkeys(("NEXT_BUFFER", "READONLY_BUFFER"), "a buffer outside the pickle"),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), "an object by its registered number"),
}


@dataclass(slots=True, eq=False)
class _DType:
    """A NumPy type; ``value`` comes with its byte order."""

    code: str
    value: np.dtype[Any] | None = None


@dataclass(slots=True, eq=False)
class _Array:
    """A NumPy array; ``value`` comes later than references to it."""

    value: Array | None = None


def loads(data: bytes) -> object:
    """The value of one pickled row, protocols 0 to 5.

    Returns:
        None, bool, int (also for an integer NumPy scalar), str, bytes, a tuple or list of such
        values, or an integer array, read-only and with the byte order it was written in.

    Raises:
        DataError: damaged, too large, or holding anything else; names what was found.
    """
    if len(data) > MAX_BYTES:
        raise DataError(f"a row of over {MAX_BYTES} bytes; token rows have about 9,000")
    machine = _Machine(data)
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if count == MAX_OPCODES:
                raise DataError(f"more than {MAX_OPCODES} steps in one row")
            assert position is not None
            machine.step(opcode.name, argument, position)
    # What genops and the decoders beneath it raise; DataError is a ValueError too.
    except DataError:
        raise
    except (ValueError, OverflowError) as error:
        raise DataError(f"a damaged pickle ({_shown(str(error))})") from None
    return machine.result()


def _shown(text: str) -> str:
    """Foreign text, short and printable."""
    return ascii(text if len(text) <= 100 else text[:100] + "...")[1:-1]


def _kind(value: object) -> str:
    if isinstance(value, _Known):
        return f"the bare name {value.name.lower()}"
    if isinstance(value, _DType | _Array):
        return "an unfinished NumPy object"
    return f"a {type(value).__name__}"


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.stack: list[object] = []
        self.below: list[list[object]] = []
        """The stacks under each open mark."""
        self.memo: dict[int, object] = {}
        self.frame_end = 0
        """Where the open frame ends; 0 outside of frames."""
        self.encoded_bytes = 0
        self.num_items = 0

    def step(self, name: str, argument: Any, position: int) -> None:
        """Follow one opcode."""
        if self.frame_end and position >= self.frame_end:
            self._close_frame(position)
        if name in _TEXT_NUMBERS:
            # "010" is 8 to pickle and 10 to genops; no writer makes such numbers.
            plain = _DECIMAL.match(self.data, position + 1)
            if not plain and not (name == "INT" and _BOOL.match(self.data, position + 1)):
                raise DataError("a damaged pickle (a number that is not plain decimal)")
        if name in _LITERALS:
            self.stack.append(self._literal(name, argument))
        elif name in _TUPLES:
            self._tuple(_TUPLES[name])
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name in ("GLOBAL", "INST"):
            self._global(name, argument, position)
        elif name == "FRAME":
            if self.frame_end or position + 9 + argument > len(self.data):
                raise DataError("a damaged pickle (frames overlap or do not end)")
            self.frame_end = position + 9 + argument
        elif name == "STOP":
            if position + 1 != len(self.data):
                raise DataError("a damaged pickle (bytes after its end)")
            self._close_frame(position + 1)
        else:
            raise DataError(f"{_OTHER_KINDS.get(name, f'the opcode {name}')}; {_EXPECTED}")

    def result(self) -> object:
        """The one value that is left."""
        if len(self.stack) != 1 or self.below:
            raise DataError("a damaged pickle (not one value)")
        return self._finished(self.stack[0], 0)

    def _finished(self, value: object, nesting: int) -> object:
        """Value with arrays in place of nodes; shared parts count at each place (no blow-up)."""
        self.num_items += 1
        if nesting > MAX_NESTING or self.num_items > MAX_ITEMS:
            raise DataError(f"lists nested over {MAX_NESTING} deep or over {MAX_ITEMS} values")
        if isinstance(value, tuple | list):
            parts = [self._finished(part, nesting + 1) for part in value]
            return tuple(parts) if isinstance(value, tuple) else parts
        if isinstance(value, _Array) and value.value is not None:
            return value.value
        if value is None or isinstance(value, bool | int | str | bytes):
            return value
        raise DataError(f"{_kind(value)}; {_EXPECTED}")

    def _literal(self, name: str, argument: Any) -> object:
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if isinstance(argument, bytearray):
            return bytes(argument)
        if isinstance(argument, int) and argument.bit_length() > 64:
            raise DataError(f"an integer of {argument.bit_length()} bits; {_EXPECTED}")
        return argument

    def _close_frame(self, position: int) -> None:
        # What pickle does where a frame cuts an opcode depends on how it reads its file.
        if self.frame_end not in (0, position):
            raise DataError("a damaged pickle (a frame that ends inside an opcode)")
        self.frame_end = 0

    def _push(self, value: object) -> None:
        self.stack.append(value)

    def _pop(self) -> object:
        if not self.stack:
            raise DataError("a damaged pickle (empty stack)")
        return self.stack.pop()

    def _pop_mark(self) -> list[object]:
        if not self.below:
            raise DataError("a damaged pickle (no mark)")
        items, self.stack = self.stack, self.below.pop()
        return items

    def _tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise DataError("a damaged pickle (empty stack)")
        start = len(self.stack) - count
        self.stack[start:] = [tuple(self.stack[start:])]

    def _extend(self, items: list[object]) -> None:
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, list):
            raise DataError("a damaged pickle (values for something that is no list)")
        target.extend(items)

    def _put(self, index: int) -> None:
        # Writers count from 0 and by one.
        if not self.stack or not 0 <= index < MAX_OPCODES:
            raise DataError("a damaged pickle (a reference to nothing, or an impossible number)")
        self.memo[index] = self.stack[-1]

    def _get(self, index: int) -> None:
        if index not in self.memo:
            raise DataError("a damaged pickle (unknown reference)")
        self.stack.append(self.memo[index])

    def _protocol(self, version: int) -> None:
        if version > 5:
            raise DataError(f"pickle protocol {version}; 0 to 5 can be read")

    def _mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _global(self, opcode: str, argument: str, position: int) -> None:
        module, _, name = argument.partition(" ")
        known = _known(module, name)
        # genops resolves escapes that pickle takes literally.
        plain = self.data.startswith(f"{module}\n{name}\n".encode(), position + 1)
        if opcode != "GLOBAL" or not plain:
            raise DataError(f"the opcode {opcode} for {_shown(argument)}; {_EXPECTED}")
        self.stack.append(known)

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise DataError("a damaged pickle (a name that is no text)")
        self.stack.append(_known(module, name))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(arguments, tuple) or not isinstance(function, _Known):
            raise DataError(f"a call of {_kind(function)}; {_EXPECTED}")
        self.stack.append(self._call(function, arguments))

    def _call(self, function: _Known, arguments: tuple[object, ...]) -> object:
        """What the call would give, for the calls in NumPy's own pickles."""
        match function, arguments:
            case _Known.RECONSTRUCT, (_Known.NDARRAY, (0 as zero,), b"b") if zero is not False:
                return _Array()
            case _Known.FROM_BUFFER, (raw, dtype, shape, ("C" | "F") as order):
                return _Array(_array(dtype, shape, order == "F", raw))
            case _Known.DTYPE, (str(code), 0, 1) if _INTEGER_TYPE.fullmatch(code):
                return _DType(code)
            case _Known.DTYPE, (str(code), *_):
                raise DataError(f"a NumPy type {_shown(code)}; token rows hold integers only")
            case _Known.SCALAR, (dtype, raw):
                return int(_array(dtype, (), False, raw))
            case _Known.ENCODE, (str(text), "latin1" | "latin-1"):
                self.encoded_bytes += len(text)
                # One text may be encoded many times over.
                if self.encoded_bytes > MAX_BYTES:
                    raise DataError(f"more than {MAX_BYTES} bytes in one row")
                return text.encode("latin-1")
            case _Known.BYTES, ():
                return b""
        raise DataError(f"a call of {function.name.lower()} in a form that NumPy does not write")

    def _build(self) -> None:
        """Give the state to the type or array on top of the stack, once."""
        state = self._pop()
        if not isinstance(state, tuple):
            raise DataError(f"a state that is {_kind(state)}; {_EXPECTED}")
        match self.stack[-1:], state:
            case [_DType(code, None) as dtype], (3, str(order), None, None, None, -1, -1, 0):
                if order not in (("|",) if code[1] == "1" else ("<", ">")):
                    raise DataError(f"a NumPy type {code} of byte order {_shown(order)}")
                dtype.value = np.dtype(order + code)
            case [_Array(None) as array], (1, shape, dtype, bool(fortran), raw):
                array.value = _array(dtype, shape, fortran, raw)
            case _:
                raise DataError("a NumPy object in a form that NumPy does not write")


def _known(module: str, name: str) -> _Known:
    found = _NAMES.get((module, name))
    if found is not None:
        return found
    shown = f"{_shown(module)}.{_shown(name)}"
    if module.partition(".")[0] == "torch":
        raise DataError(
            f"a torch tensor ({shown}), which only running the pickle could read; write the rows "
            f"again with tensor.numpy()"
        )
    raise DataError(f"the name {shown}, which was not run; {_EXPECTED}")


def _array(dtype: object, shape: object, fortran: bool, raw: object) -> Array:
    """View of ``raw``: no copy is made, however often the pickle uses the same bytes."""
    if not isinstance(dtype, _DType) or dtype.value is None:
        raise DataError("an array without an integer type")
    if type(raw) is not bytes:
        raise DataError(f"an array of {_kind(raw)} instead of bytes")
    sizes = shape if isinstance(shape, tuple) and len(shape) <= MAX_DIMENSIONS else (None,)
    lengths = [n for n in sizes if type(n) is int and 0 <= n <= MAX_BYTES]
    if len(lengths) != len(sizes):
        raise DataError(f"an array shape that is not 0 to {MAX_DIMENSIONS} small integers")
    needed = math.prod(lengths) * dtype.value.itemsize
    if needed != len(raw):
        raise DataError(
            f"an array of shape {tuple(lengths)} and type {dtype.value.str} with {len(raw)} bytes "
            f"instead of {needed}"
        )
    # np.frombuffer refuses a buffer without bytes.
    flat = np.frombuffer(raw, dtype.value) if raw else np.empty(0, dtype.value)
    return flat.reshape(lengths, order="F" if fortran else "C")


_EXPECTED = "token rows hold integers, texts, tuples, lists and integer NumPy arrays"
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine._protocol,
    "MARK": lambda machine, _: machine._mark(),
    "TUPLE": lambda machine, _: machine._push(tuple(machine._pop_mark())),
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "LIST": lambda machine, _: machine._push(machine._pop_mark()),
    "APPEND": lambda machine, _: machine._extend([machine._pop()]),
    "APPENDS": lambda machine, _: machine._extend(machine._pop_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    "MEMOIZE": lambda machine, _: machine._put(len(machine.memo)),
    "STACK_GLOBAL": lambda machine, _: machine._stack_global(),
    "REDUCE": lambda machine, _: machine._reduce(),
    "BUILD": lambda machine, _: machine._build(),
}
