"""Reader of torch's pickled checkpoint index that runs nothing, whatever the pickle says.

The opcodes are followed on a stack of our own.  Names become marks and objects become nodes with
their arguments: nothing is imported, called or hashed.  Only the names that torch and megatron-core
write stand in the table; any other ends the reading.  Knows nothing of what the nodes mean.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_cogview.configs.errors import CheckpointError

MAX_BYTES = 1 << 27
MAX_OPCODES = 12_000_000
"""A part of a tensor takes 72, and a thousand ranks have some 30,000 parts; each takes, at worst,
200 bytes of memory."""
MAX_INTEGER_BITS = 63

ALLOWED_MODULES = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    },
    "torch.serialization": {"_get_layout"},
    "torch.storage": set(),
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreSavePlan", "MCoreMetadata"},
    "torch": {
        *("Size", "device"),
        *("float64", "float32", "float16", "bfloat16"),
        *("int64", "int32", "int16", "int8", "bool"),
        *("uint64", "uint32", "uint16", "uint8"),
        *("complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
    },
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"list", "dict"},
}
"""What an index may speak of: names by module, None for all of them.  Being named here lets a name
stand in a file; it is never looked up."""


@dataclass(slots=True, eq=False)
class Name:
    """A name in a module."""

    module: str
    name: str


@dataclass(slots=True, eq=False)
class Made:
    """An object: what would have made it, from what, and what it was then given."""

    maker: Name
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[tuple[Any, Any]] = field(default_factory=list)
    """Of a dictionary's subclass."""


@dataclass(slots=True, eq=False)
class Pairs:
    """A dictionary, as the pairs that were put into it."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


def loads(data: bytes) -> Any:
    """The one value of a pickle: literals, tuples and lists as they are, the rest as nodes.

    Raises:
        CheckpointError: damaged, too large, or with a name that does not belong there.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"an index of {len(data)} bytes; at most {MAX_BYTES} are read")
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count == MAX_OPCODES:
                raise CheckpointError(f"more than {MAX_OPCODES} steps in an index")
            machine.step(opcode.name, argument)
    except (ValueError, OverflowError, RecursionError, MemoryError, IndexError) as error:
        raise CheckpointError(f"a damaged index ({type(error).__name__}: {error})") from None
    if len(machine.stack) != 1 or machine.below:
        raise CheckpointError("a damaged index (not one value)")
    return machine.stack[0]


class _Machine:
    """Stack, marks and memo of one pickle; a wrong stack is an ``IndexError``."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Follow one opcode."""
        if name in _LITERALS:
            if isinstance(argument, int) and argument.bit_length() > MAX_INTEGER_BITS:
                raise CheckpointError("a damaged index (an integer that is no size)")
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            count = _TUPLES[name]
            if len(self.stack) < count:
                raise IndexError("empty stack")
            start = len(self.stack) - count
            self.stack[start:] = [tuple(self.stack[start:])]
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name not in _IGNORED:
            raise CheckpointError(f"a damaged index (the opcode {name} does not belong there)")

    def mark(self) -> None:
        """Put the stack aside."""
        self.below.append(self.stack)
        self.stack = []

    def push(self, value: Any) -> None:
        """Put a value on top."""
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        """What was put on since the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def put(self, index: int) -> None:
        """Remember the value on top."""
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        """Put a remembered value on top."""
        if index not in self.memo:
            raise IndexError("unknown reference")
        self.stack.append(self.memo[index])

    def extend(self, items: list[Any]) -> None:
        """Put values into the list on top."""
        target = self.stack[-1]
        if not isinstance(target, list):
            raise CheckpointError("a damaged index (values for something that is no list)")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Put pairs into the dictionary on top."""
        target = self.stack[-1]
        if not isinstance(target, Pairs | Made) or len(items) % 2:
            raise CheckpointError("a damaged index (pairs for something that is no dictionary)")
        target.items.extend(zip(items[::2], items[1::2], strict=True))

    def name(self, module: Any, name: Any) -> None:
        """Put a mark for a name on top."""
        allowed = ALLOWED_MODULES.get(module, set()) if isinstance(module, str) else set()
        if (
            not isinstance(name, str)
            or (allowed is not None and name not in allowed)
            or "." in name
        ):
            raise CheckpointError(
                f"the index names {_shown(module)}.{_shown(name)}, which no checkpoint needs; "
                "nothing was run, and nothing is loaded from it"
            )
        self.stack.append(Name(module, name))

    def make(self) -> None:
        """Put a node for a call on top."""
        arguments, maker = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple) or not isinstance(maker, Name):
            raise CheckpointError("a damaged index (a call of something that is no name)")
        self.stack.append(Made(maker, arguments))

    def build(self) -> None:
        """Give its state to the node on top, once."""
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Made) or target.state is not None:
            raise CheckpointError("a damaged index (a state for something that takes none)")
        target.state = state


def _shown(value: Any) -> str:
    """A text for a message.  Anything else may be larger, written out, than all memory."""
    return ascii(value[:80])[1:-1] if isinstance(value, str) else f"<{type(value).__name__}>"


_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = {"PROTO", "FRAME", "STOP"}


def _global(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.name(module, name)


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.name(module, name)


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda machine, _: machine.mark(),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append(Pairs()),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": lambda machine, _: machine.make(),
    "NEWOBJ": lambda machine, _: machine.make(),
    "BUILD": lambda machine, _: machine.build(),
}
