"""Pickles read as what they are, a list of instructions, without a single live object in reach of them.

Python's unpicklers look up classes and functions and then call them and set their attributes, so that a list of
allowed names is not enough: an allowed class can be changed for the whole process. Here a name stays text, a call is a
record of it (:class:`Made`), and setting a state fills a field of that record. What it all means is for the caller to
check. Nothing is hashed, compared or called, and memory grows with the number of instructions, which is limited.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moepp.io.untrusted import show

MAX_INSTRUCTIONS = 30_000_000  # about 60 of them describe a tensor
_PROTOCOLS = (2, 3, 4, 5)


class Name(str):
    """Dotted name of a class or function."""

    __slots__ = ()


class Pairs(list):
    """A dictionary as its (key, value) pairs, in the order of the file."""

    __slots__ = ()


@dataclass(slots=True)
class Made:
    """What calling ``name`` with ``args`` would have made, and the state that it would have been given."""

    name: Name
    args: tuple
    state: Any = None
    has_state: bool = False


@dataclass(slots=True)
class Persistent:
    """A reference to something stored beside the pickle."""

    key: Any


def interpret(data: bytes, allowed: frozenset[str], what: str) -> Any:
    """Return the value of a pickle (protocol 2 to 5): None, bool, int, str, tuple, list, and the classes above.

    Args:
        data: the pickle; nothing may follow it.
        allowed: dotted names that may occur in it.
        what: what the pickle is, for messages.

    Raises:
        ValueError: another name, an instruction that no such pickle needs, or bytes that are no pickle.
    """
    machine = _Machine(allowed, what)
    if data[:1] != _PROTO:
        raise ValueError("it is not a pickle of protocol 2 to 5")
    position = 0
    for _ in range(MAX_INSTRUCTIONS):
        code = data[position : position + 1]
        if code == _STOP:
            break
        try:
            read_argument, action = _ACTIONS[code]
        except KeyError:
            known = next((opcode.name for opcode in pickletools.opcodes if opcode.code.encode("latin-1") == code), None)
            raise ValueError(f"{known or 'the end'} at byte {position} is not part of {what}") from None
        try:
            argument, position = read_argument(data, position + 1)
            action(machine, argument)
        except IndexError:
            raise ValueError(f"the instruction before byte {position} lacks its operands") from None
    else:
        raise ValueError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
    if position + 1 != len(data):
        raise ValueError("bytes follow the end of its pickle")
    if len(machine.stack) != 1 or machine.outer:
        raise ValueError("its pickle leaves something other than one value")
    return machine.stack[0]


class _Machine:
    def __init__(self, allowed: frozenset[str], what: str) -> None:
        self.allowed, self.what = allowed, what
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below each mark
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: object) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def protocol(self, number: int) -> None:
        if number not in _PROTOCOLS:
            raise ValueError(f"it is a pickle of protocol {number}, not of 2 to 5")

    def global_(self, names: tuple[str, str]) -> None:
        self.push(self.named(*names))

    def stack_global(self, _: object) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        self.push(self.named(module, attribute))

    def named(self, module: Any, attribute: Any) -> Name:
        if type(module) is not str or type(attribute) is not str:
            raise ValueError("a name in it is not text")
        name = f"{module}.{attribute}"
        if name not in self.allowed:
            raise ValueError(f"{show(name, 100)[1:-1]} is not part of {self.what}")
        return Name(name)

    def call(self, _: object) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(arguments) is not tuple:
            raise ValueError(f"a call of {_describe(name)} is not part of {self.what}")
        self.push(Made(name, arguments))

    def build(self, _: object) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not Made or target.has_state:
            raise ValueError(f"setting the state of {_describe(target)} is not part of {self.what}")
        target.state, target.has_state = state, True

    def take_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.push(items)

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise IndexError
        self.top(Pairs).extend(zip(items[::2], items[1::2], strict=True))

    def top(self, kind: type) -> list:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"adding items to {_describe(self.stack[-1])} is not part of {self.what}")
        return self.stack[-1]

    def pop_two(self) -> list[Any]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]

    def recall(self, number: int) -> None:
        if number not in self.memo:
            raise IndexError
        self.push(self.memo[number])

    def remember(self, number: int) -> None:
        self.memo[number] = self.stack[-1]


def _nothing(data: bytes, start: int) -> tuple[None, int]:
    return None, start


def _number(size: int, signed: bool = False) -> Callable[[bytes, int], tuple[int, int]]:
    def read(data: bytes, start: int) -> tuple[int, int]:
        return int.from_bytes(_taken(data, start, size), "little", signed=signed), start + size

    return read


def _text(size: int) -> Callable[[bytes, int], tuple[str, int]]:
    """UTF-8 text behind its length in ``size`` bytes. Halves of surrogate pairs are refused, and are ValueErrors."""

    def read(data: bytes, start: int) -> tuple[str, int]:
        start, end = start + size, start + size + int.from_bytes(_taken(data, start, size), "little")
        return _taken(data, start, end - start).decode(), end

    return read


def _long(data: bytes, start: int) -> tuple[int, int]:
    size = _taken(data, start, 1)[0]
    return int.from_bytes(_taken(data, start + 1, size), "little", signed=True), start + 1 + size


def _frame(data: bytes, start: int) -> tuple[None, int]:
    size = int.from_bytes(_taken(data, start, 8), "little")
    if size > len(data) - start - 8:
        raise ValueError("its pickle is cut off")
    return None, start + 8


def _two_lines(data: bytes, start: int) -> tuple[tuple[str, str], int]:
    middle = data.find(b"\n", start, start + _MAX_LINE)
    end = data.find(b"\n", middle + 1, middle + _MAX_LINE) if middle >= 0 else -1
    if end < 0:
        raise ValueError("its pickle is cut off")
    return (data[start:middle].decode(), data[middle + 1 : end].decode()), end + 1


def _taken(data: bytes, start: int, size: int) -> bytes:
    if size > len(data) - start:
        raise ValueError("its pickle is cut off")
    return data[start : start + size]


def _describe(value: Any) -> str:
    return show(str(value)) if type(value) in (Name, str) else type(value).__name__


_PROTO, _STOP, _MAX_LINE = b"\x80", b".", 1000
_Action = Callable[[_Machine, Any], object]
# Code of the instruction -> (how its argument is read, what it does); names as in Python's pickle.py.
_ACTIONS: dict[bytes, tuple[Callable[[bytes, int], tuple[Any, int]], _Action]] = {
    _PROTO: (_number(1), _Machine.protocol),
    b"\x95": (_frame, lambda machine, _: None),  # FRAME
    b"(": (_nothing, _Machine.mark),
    b"N": (_nothing, lambda machine, _: machine.push(None)),
    b"\x88": (_nothing, lambda machine, _: machine.push(True)),
    b"\x89": (_nothing, lambda machine, _: machine.push(False)),
    b"K": (_number(1), _Machine.push),  # BININT1
    b"M": (_number(2), _Machine.push),  # BININT2
    b"J": (_number(4, signed=True), _Machine.push),  # BININT
    b"\x8a": (_long, _Machine.push),  # LONG1
    b"\x8c": (_text(1), _Machine.push),  # SHORT_BINUNICODE
    b"X": (_text(4), _Machine.push),  # BINUNICODE
    b"\x8d": (_text(8), _Machine.push),  # BINUNICODE8
    b"}": (_nothing, lambda machine, _: machine.push(Pairs())),  # EMPTY_DICT
    b"]": (_nothing, lambda machine, _: machine.push([])),  # EMPTY_LIST
    b")": (_nothing, lambda machine, _: machine.push(())),  # EMPTY_TUPLE
    b"\x85": (_nothing, lambda machine, _: machine.take_tuple(1)),  # TUPLE1
    b"\x86": (_nothing, lambda machine, _: machine.take_tuple(2)),  # TUPLE2
    b"\x87": (_nothing, lambda machine, _: machine.take_tuple(3)),  # TUPLE3
    b"t": (_nothing, lambda machine, _: machine.push(tuple(machine.pop_to_mark()))),  # TUPLE
    b"c": (_two_lines, _Machine.global_),
    b"\x93": (_nothing, _Machine.stack_global),
    b"R": (_nothing, _Machine.call),  # REDUCE
    b"\x81": (_nothing, _Machine.call),  # NEWOBJ
    b"b": (_nothing, _Machine.build),
    b"s": (_nothing, lambda machine, _: machine.set_items(machine.pop_two())),  # SETITEM
    b"u": (_nothing, lambda machine, _: machine.set_items(machine.pop_to_mark())),  # SETITEMS
    b"a": (_nothing, lambda machine, _: machine.extend([machine.stack.pop()])),  # APPEND
    b"e": (_nothing, lambda machine, _: machine.extend(machine.pop_to_mark())),  # APPENDS
    b"\x94": (_nothing, lambda machine, _: machine.remember(len(machine.memo))),  # MEMOIZE
    b"q": (_number(1), _Machine.remember),  # BINPUT
    b"r": (_number(4), _Machine.remember),  # LONG_BINPUT
    b"h": (_number(1), _Machine.recall),  # BINGET
    b"j": (_number(4), _Machine.recall),  # LONG_BINGET
    b"Q": (_nothing, lambda machine, _: machine.push(Persistent(machine.stack.pop()))),  # BINPERSID
}
