"""Pickles read as data: the items of a pickled list, without running anything.

A pickle is a program for a stack machine that may call anything. Only the few instructions that a list of numpy arrays
takes are known here, and the few names they call (`_reconstruct`, `_frombuffer`, `dtype`, `scalar`, `encode`) are not
called but recognised: each makes the plain value it stands for. Everything else is refused by its name. Items are
handed on as they come, so memory does not grow with the file (but for its strings, which the pickle may refer back to).
Source: Python's pickletools, which documents every instruction; numpy's `ndarray.__reduce_ex__`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, NoReturn

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError

Array = npt.NDArray[Any]

_VALUE_BYTES = 64 << 20  # of one value: far more than a vector takes, and a crafted length allocates no more
_LINE_BYTES = 4096
_DEEPEST_STACK = 20_000  # Python writes lists a thousand items at a time, each item a few values
_REMEMBERED = 1024  # characters: what is longer is a vector's content, never an id or a name
_ORDERS = ("<", ">", "|", "=")
_EXPECTED = "a pickled list of tuples, strings, numbers and numpy arrays of numbers"
_DTYPES = frozenset(kind + size for kind in "fiu" for size in "1248") - {"f1"}
_NUMPY = ("numpy.core.", "numpy._core.")  # before numpy 2, and since
_KNOWN = {
    **{f"{core}multiarray._reconstruct": "array" for core in _NUMPY},
    **{f"{core}multiarray.scalar": "scalar" for core in _NUMPY},
    **{f"{core}numeric._frombuffer": "buffer" for core in _NUMPY},
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "encode",
}


def read_items(path: str) -> Iterator[Any]:
    """Yield the items of the pickled list in `path`: tuples, lists, strings, bytes, numbers, and ndarrays of numbers.

    Raises InputError when the file is damaged, holds no list, or names anything that such a list does not take.
    """
    with open(path, "rb") as handle:
        bounded: Any = _Bounded(handle)
        try:
            yield from _Machine(path).run(pickletools.genops(bounded))
        except (ValueError, OverflowError, IndexError, TypeError, MemoryError) as error:
            hint = "copy or download it again"
            raise InputError(f"the pickle is damaged: {error}", where=path, expected=_EXPECTED, hint=hint) from error
        if handle.read(1):
            raise InputError("the file goes on behind its pickle", where=path, expected=_EXPECTED)


def type_name(value: Any) -> str:
    return type(value).__name__.lstrip("_").lower()


class _Bounded:
    """A file that refuses to read more at once than any value here needs."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.handle = handle

    def read(self, num_bytes: int) -> bytes:
        if num_bytes > _VALUE_BYTES:
            raise ValueError(f"a value of {num_bytes:,} bytes")
        return self.handle.read(num_bytes)

    def readline(self) -> bytes:
        return self.handle.readline(_LINE_BYTES)


# Values that are not plain ones


@dataclass(frozen=True)
class _Name:
    """A name of _KNOWN, by what it stands for."""

    role: str


class _Mark:
    """Where a tuple or a run of items begins on the stack."""


class _Root(list[Any]):
    """The outermost list, whose items are handed on."""


@dataclass
class _Dtype:
    code: str
    order: str = "="


class _Unfilled:
    """An array before its content is known."""


class _Machine:
    """The part of pickle's stack machine that lists, tuples, strings, numbers and numpy arrays take."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.num_memoised = 0

    def run(self, instructions: Iterator[Any]) -> Iterator[Any]:
        """Yield the items of the list that the instructions make."""
        for opcode, argument, _ in instructions:
            act = _ACTIONS.get(opcode.name)
            if act is None:
                _refuse(f"it has the instruction {opcode.name}", self.path)
            act(self, argument)
            if len(self.stack) > _DEEPEST_STACK:
                _refuse("its list is written in one piece", self.path)
            root = self.stack[0] if self.stack else None
            if isinstance(root, _Root):
                yield from root
                root.clear()
        if len(self.stack) != 1 or not isinstance(self.stack[0], _Root):
            raise InputError(f"the pickle holds a {type_name(self.stack[0])}", where=self.path, expected=_EXPECTED)

    def pop_to_mark(self) -> list[Any]:
        """Take and return what lies above the topmost mark, and the mark with it."""
        at = len(self.stack) - 1
        while not isinstance(self.stack[at], _Mark):
            at -= 1
            if at < 0:
                raise ValueError("an end without a beginning")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def push_list(self, _: Any) -> None:
        self.stack.append([] if self.stack else _Root())

    def push_tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise ValueError("too few values for a tuple")
        values = tuple(self.stack[len(self.stack) - size :])
        del self.stack[len(self.stack) - size :]
        self.stack.append(values)

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items without a list")
        self.stack[-1].extend(values)

    def remember(self, key: int) -> None:
        """Keep the top of the stack for later, unless it is a vector or holds one."""
        self.num_memoised += 1
        value = self.stack[-1]
        small = isinstance(value, str | bytes) and len(value) <= _REMEMBERED
        if small or isinstance(value, _Name | _Dtype):
            self.memo[key] = value

    def recall(self, key: int) -> None:
        if key not in self.memo:
            _refuse("it refers back to a vector or a list", self.path)
        self.stack.append(self.memo[key])

    def push_name(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}"
        if full not in _KNOWN:
            _refuse(f"it names {full}", self.path)
        self.stack.append(_Name(_KNOWN[full]))

    def push_name_from_stack(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push_name(module, name)

    def call(self, _: Any) -> None:
        """Make the value that a call of a known name stands for."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            _refuse("it calls a value", self.path)
        make = _CALLS.get(name.role)
        if make is None:
            _refuse(f"it calls {name.role}", self.path)
        self.stack.append(make(*arguments))

    def build(self, _: Any) -> None:
        """Give a dtype its byte order, or an array its content."""
        state, value = self.stack.pop(), self.stack[-1]
        if isinstance(value, _Dtype) and isinstance(state, tuple) and len(state) > 1 and state[1] in _ORDERS:
            value.order = state[1]
        elif isinstance(value, _Unfilled) and isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, fortran, content = state
            self.stack[-1] = _array(content, dtype, shape, "F" if fortran else "C")
        else:
            _refuse(f"it sets the state of a {type_name(value)}", self.path)


def _refuse(reason: str, path: str) -> NoReturn:
    raise InputError(
        f"the pickle is refused: {reason}",
        where=path,
        expected=_EXPECTED,
        hint="do not load this file elsewhere unless you trust its author",
    )


def _array(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
    if not isinstance(content, bytes | bytearray) or not isinstance(dtype, _Dtype):
        raise ValueError("an array whose content is no plain bytes")
    return np.frombuffer(content, _numpy(dtype.code, dtype.order)).reshape(shape, order="F" if order == "F" else "C")


@lru_cache(maxsize=64)
def _numpy(code: str, order: str) -> np.dtype[Any]:
    return np.dtype(code) if order in "|=" else np.dtype(order + code)


def _dtype(code: Any, *_: Any) -> _Dtype:
    if code not in _DTYPES:
        raise ValueError(f"an array of type {code!r}; vectors are floats")
    return _Dtype(code)


def _reconstruct(kind: Any, *_: Any) -> _Unfilled:
    if not isinstance(kind, _Name) or kind.role != "ndarray":
        raise ValueError("an array that is no plain ndarray")
    return _Unfilled()


def _buffer(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
    return _array(content, dtype, shape, order)


def _scalar(dtype: Any, content: Any) -> Any:
    return _array(content, dtype, (), "C").item()


def _encode(text: Any, codec: Any) -> bytes:
    """Return the bytes that protocols 0 to 2 write as text."""
    if not isinstance(text, str) or codec != "latin1":
        raise ValueError("bytes that are no latin1 text")
    return text.encode("latin1")


_CALLS: dict[str, Callable[..., Any]] = {
    "dtype": _dtype,
    "array": _reconstruct,
    "buffer": _buffer,
    "scalar": _scalar,
    "encode": _encode,
}

_Action = Callable[[_Machine, Any], None]


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _nothing(machine: _Machine, _: Any) -> None:
    pass


_PLAIN = (
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
)
_ACTIONS: dict[str, _Action] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _nothing),
    **dict.fromkeys(_PLAIN, _push),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    "MEMOIZE": lambda machine, _: machine.remember(machine.num_memoised),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "MARK": lambda machine, _: machine.stack.append(_Mark()),
    "EMPTY_LIST": _Machine.push_list,
    "EMPTY_TUPLE": lambda machine, _: machine.push_tuple(0),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "GLOBAL": lambda machine, argument: machine.push_name(*argument.split(" ", 1)),
    "STACK_GLOBAL": _Machine.push_name_from_stack,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}
