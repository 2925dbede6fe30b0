"""Pickles as data: the part of the pickle machine that a state dict needs, without the part that runs code.

A pickle is a program for a stack machine, https://github.com/python/cpython/blob/3.11/Lib/pickletools.py. Its power to
do harm is in the names it looks up and calls. Here a name is only looked up in a table of ours, what is called stands
in that table too, and what comes out is inert: None, bool, int, float, str, bytes, tuple, list, dict, the table's
records, and for an object of any other name an `UnknownObject`, whatever was to be done to it.
"""

import pickle  # for the names of its opcodes only
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nnfwd.errors import ModelFileError

_NAME = 256  # bytes of a module's or a function's name
_TEXT = 2**20  # bytes of a string, which may take four times as many in memory


@dataclass(frozen=True, slots=True)
class UnknownObject:
    """A class, a function or what they would have made, by name only: nothing was looked up, nothing called."""

    module: str
    name: str

    def __str__(self) -> str:
        return ascii(f"{self.module}.{self.name}")[1:-1]


def inert(data: bytes, names: Mapping[str, Any], stored: Callable[[Any], Any], opcodes: int) -> Any:
    """What a pickle of protocols 2 to 5 describes.

    Lists and dicts may contain themselves: who walks through the result counts the depth.

    Args:
        data: the pickle, from its first byte to its last.
        names: what `module name` stands for: a function to be called with what the pickle gives it, or a record. Any
            other name is an `UnknownObject`, and so is what the pickle makes of it.
        stored: what a persistent id stands for.
        opcodes: how many there may be, which also limits how many objects are made.

    Raises:
        ModelFileError: for an opcode that needs more than this, or that is given something else than it takes.
        Exception: for damaged bytes, what Python raises: LookupError, TypeError, ValueError, struct.error.
    """
    machine = _Machine(data, names, stored)
    for _ in range(opcodes):
        if machine.step():
            return machine.result()
    raise ModelFileError(f"data.pkl has more than {opcodes} opcodes: raise limits.tensors if you trust it")


class _Machine:
    def __init__(self, data: bytes, names: Mapping[str, Any], stored: Callable[[Any], Any]) -> None:
        self._data = data
        self._at = 0
        self._names = names
        self._stored = stored
        self._memo: dict[int, Any] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stack as it was before each mark

    def result(self) -> Any:
        if len(self._stack) != 1 or self._below or self._at != len(self._data):
            raise ModelFileError("data.pkl does not end where its object does")
        return self._stack[0]

    def step(self) -> bool:
        """Executes one opcode; whether it was the last."""
        stack = self._stack
        match opcode := self._take(1):
            case pickle.STOP:
                return True
            case pickle.PROTO:
                if not 2 <= self._number("<B") <= 5:
                    raise ModelFileError("data.pkl is of an unknown version of pickle")
            case pickle.FRAME:
                if self._number("<Q") > len(self._data) - self._at:
                    raise ModelFileError("data.pkl ends inside a frame")

            case pickle.NONE:
                stack.append(None)
            case pickle.NEWTRUE:
                stack.append(True)
            case pickle.NEWFALSE:
                stack.append(False)
            case pickle.BININT:
                stack.append(self._number("<i"))
            case pickle.BININT1:
                stack.append(self._number("<B"))
            case pickle.BININT2:
                stack.append(self._number("<H"))
            case pickle.LONG1:
                stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))
            case pickle.BINFLOAT:
                stack.append(self._number(">d"))
            case pickle.SHORT_BINUNICODE:
                stack.append(self._text(self._number("<B")))
            case pickle.BINUNICODE:
                stack.append(self._text(self._number("<I")))
            case pickle.SHORT_BINBYTES:
                stack.append(self._take(self._number("<B")))
            case pickle.BINBYTES:
                stack.append(self._take(self._number("<I")))
            case pickle.BYTEARRAY8:
                stack.append(self._take(self._number("<Q")))

            case pickle.MARK:
                self._below.append(stack)
                self._stack = []
            case pickle.EMPTY_TUPLE:
                stack.append(())
            case pickle.TUPLE1:
                stack[-1:] = [(stack[-1],)]
            case pickle.TUPLE2:
                stack[-2:] = [(stack[-2], stack[-1])]
            case pickle.TUPLE3:
                stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
            case pickle.TUPLE:
                elements = tuple(self._since_mark())
                self._stack.append(elements)
            case pickle.EMPTY_LIST:
                stack.append([])
            case pickle.APPEND:
                item = stack.pop()
                _extend(stack[-1], [item])
            case pickle.APPENDS:
                items = self._since_mark()
                _extend(self._stack[-1], items)
            case pickle.EMPTY_DICT:
                stack.append({})
            case pickle.SETITEM:
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case pickle.SETITEMS:
                items = self._since_mark()
                _set(self._stack[-1], items)
            case pickle.EMPTY_SET:
                stack.append(UnknownObject("builtins", "set"))
            case pickle.ADDITEMS:
                self._since_mark()
                _a(UnknownObject, self._stack[-1])
            case pickle.FROZENSET:
                self._since_mark()
                self._stack.append(UnknownObject("builtins", "frozenset"))

            case pickle.BINPUT:
                self._memo[self._number("<B")] = stack[-1]
            case pickle.LONG_BINPUT:
                self._memo[self._number("<I")] = stack[-1]
            case pickle.MEMOIZE:
                self._memo[len(self._memo)] = stack[-1]
            case pickle.BINGET:
                stack.append(self._remembered(self._number("<B")))
            case pickle.LONG_BINGET:
                stack.append(self._remembered(self._number("<I")))

            case pickle.GLOBAL:
                module, name = self._line(), self._line()
                stack.append(self._named(module, name))
            case pickle.STACK_GLOBAL:
                name, module = stack.pop(), stack.pop()
                stack.append(self._named(module, name))
            case pickle.REDUCE:
                arguments, function = stack.pop(), stack.pop()
                if isinstance(function, UnknownObject):
                    stack.append(function)
                elif callable(function):
                    stack.append(function(*_a(tuple, arguments)))
                else:
                    raise ModelFileError(f"data.pkl calls a {type(function).__name__}")
            case pickle.NEWOBJ:
                stack.pop()
                _a(UnknownObject, stack[-1])
            case pickle.NEWOBJ_EX:
                del stack[-2:]
                _a(UnknownObject, stack[-1])
            case pickle.BUILD:
                state = stack.pop()
                # The attribute of a state dict in which PyTorch keeps the versions of its modules.
                versions = isinstance(stack[-1], dict) and _a(dict, state).keys() == {"_metadata"}
                if not versions and not isinstance(stack[-1], UnknownObject):
                    raise ModelFileError(f"data.pkl sets attributes of a {type(stack[-1]).__name__}")
            case pickle.BINPERSID:
                stack.append(self._stored(stack.pop()))

            case _:
                raise ModelFileError(
                    f"data.pkl has opcode {opcode[0]:#04x} at byte {self._at - 1}, which no state dict needs: "
                    "save it again with torch.save(model.state_dict(), path)"
                )
        return False

    def _take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) != size:
            raise ModelFileError("data.pkl ends early")
        self._at += size
        return taken

    def _number(self, layout: str) -> Any:
        (number,) = struct.unpack(layout, self._take(struct.calcsize(layout)))
        return number

    def _text(self, size: int) -> str:
        if size > _TEXT:
            raise ModelFileError(f"data.pkl has a string of {size} bytes, more than {_TEXT}")
        return str(self._take(size), "utf-8")

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + _NAME)
        if end < 0:
            raise ModelFileError(f"data.pkl has a name without an end in {_NAME} bytes")
        line = self._text(end - self._at)
        self._at += 1
        return line

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _remembered(self, index: int) -> Any:
        if index not in self._memo:
            raise ModelFileError(f"data.pkl refers to its object {index}, which is not there")
        return self._memo[index]

    def _named(self, module: Any, name: Any) -> Any:
        if len(_a(str, module)) > _NAME or len(_a(str, name)) > _NAME:
            raise ModelFileError(f"data.pkl has a name of more than {_NAME} characters")
        return self._names.get(f"{module} {name}") or UnknownObject(module, name)


def _a(kind: type, value: Any) -> Any:
    """The value, which must be of that type and of none derived from it."""
    if type(value) is not kind:
        raise ModelFileError(f"data.pkl has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _extend(target: Any, items: list[Any]) -> None:
    """Appends to a list."""
    if not isinstance(target, UnknownObject):
        _a(list, target).extend(items)


def _set(target: Any, items: list[Any]) -> None:
    """Puts keys and values, one after the other, into a dict."""
    if isinstance(target, UnknownObject):
        return
    for key in items[::2]:
        # Numbers without end have hashes that are alike, and a dict of such keys takes for ever.
        if type(key) is not str and not (type(key) is int and abs(key) < 2**63):
            raise ModelFileError(f"data.pkl has a dict with a {type(key).__name__} as key")
    _a(dict, target).update(zip(items[::2], items[1::2], strict=True))
