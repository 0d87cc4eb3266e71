"""A small unpickler: the operations that appear in pickles of torch.save, and the calls that `torch_calls.py` lists."""

from __future__ import annotations

__all__ = ["Unpickler", "exactly"]

import argparse
import collections
import pickle
import struct
from collections.abc import Callable, Iterator
from typing import IO, Any

import torch
from torch import Tensor

from energy_prior._util import shown
from energy_prior.adapters.torch_calls import CALLS, COPIES, Name, Stored, UnsafeError, key_of, named

_FREE, _BYTES_EACH = 2**17, 3  # containers: so many, and one for so many bytes, as an empty one takes a hundred of memory
_OF_TENSOR = 4  # containers that a tensor counts as
_LONGEST_NAME = 200
_PLAIN = (int, float, complex, str, bytes, bytearray, type(None), torch.Size, torch.dtype, torch.device, Tensor)


def exactly(file: IO[bytes], count: int) -> bytes:
    """So many bytes.

    Raises:
        ValueError: if there are fewer.
    """
    content = file.read(count)
    if len(content) != count:
        raise ValueError("it ends too early")
    return content


class Unpickler:
    """Reads one pickle of protocol 2, as torch.save writes it.

    Args:
        file: the pickle is next in it.
        size: bytes that there are at most.
        load: gets what a reference to the values of a tensor says of them.
    """

    def __init__(self, file: IO[bytes], size: int, load: Callable[..., Stored]) -> None:
        self._file, self._size, self._load = file, size, load
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._left = _FREE + size // _BYTES_EACH

    def load(self) -> Any:
        """The value, in which there are tensors and plain values.

        Raises:
            UnsafeError: if there would be anything else.
            Exception: any other, if this is no such pickle.
        """
        while True:
            operation = self._file.read(1)
            if operation == pickle.STOP:
                return _plain(self._stack.pop())
            if operation not in _OPERATIONS:
                raise ValueError("it is no pickle of torch.save" if operation else "it ends too early")
            _OPERATIONS[operation](self)

    def read(self, count: int) -> bytes:
        """So many bytes."""
        if count > self._size:  # before there is memory for them
            raise ValueError("it ends too early")
        return exactly(self._file, count)

    def number(self, form: str) -> Any:
        """A number in the form that the module struct calls so."""
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]

    def line(self) -> str:
        """Text up to the end of a line."""
        text = self._file.readline(_LONGEST_NAME)
        if not text.endswith(b"\n"):
            raise ValueError("it is no pickle of torch.save")
        return text[:-1].decode()

    def count(self, containers: int) -> None:
        """Counts what takes far more memory than its part of the file."""
        self._left -= containers
        if self._left < 0:
            raise ValueError("it holds more lists, dicts and tuples than a file of its size does")

    def push(self, value: Any) -> None:
        """Puts a value on the stack."""
        if isinstance(value, list | dict | tuple | set | Tensor):
            self.count(_OF_TENSOR if isinstance(value, Tensor) else 1)
        self._stack.append(value)

    def pop(self) -> Any:
        """Takes the last value off."""
        return self._stack.pop()

    def pop_tuple(self, count: int) -> tuple[Any, ...]:
        """Takes the last values off."""
        return tuple([self._stack.pop() for _ in range(count)][::-1])

    def mark(self) -> None:
        """Begins a group."""
        self.count(1)
        self._marked.append(self._stack)
        self._stack = []

    def group(self) -> list[Any]:
        """Ends a group, and gives what is in it."""
        items, self._stack = self._stack, self._marked.pop()
        return items

    def remember(self, index: int) -> None:
        """Keeps the last value."""
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        """Puts a value that was kept on the stack."""
        self._stack.append(self._memo[index])

    def extend(self, items: list[Any]) -> None:
        """Puts items into the list that is last."""
        if type(self._stack[-1]) is not list:
            raise ValueError(f"a {type(self._stack[-1]).__name__} is no list")
        self._stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """Puts keys and values, by turns, into the dict that is last."""
        if not isinstance(self._stack[-1], dict):
            raise ValueError(f"a {type(self._stack[-1]).__name__} is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._stack[-1][key_of(key)] = value

    def refer(self) -> None:
        """Values of a tensor."""
        reference = self.pop()
        if not isinstance(reference, tuple) or len(reference) < 2 or reference[0] != "storage":
            raise UnsafeError(shown(reference[0] if isinstance(reference, tuple) and reference else reference))
        self._stack.append(self._load(*reference[1:]))

    def call(self) -> None:
        """Calls a function."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name) or function.name not in CALLS or not isinstance(arguments, tuple):
            raise UnsafeError(function.name if isinstance(function, Name) else shown(function))
        if function.name in COPIES and arguments:
            self.count(len(arguments[0]) // COPIES[function.name])
        self.push(CALLS[function.name](*arguments))

    def build(self) -> None:
        """Gives a namespace its attributes, and a state dict what it says of versions; nothing else has a state."""
        state, target = self.pop(), self._stack[-1]
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise ValueError("a state is no dict")
        if type(target) is argparse.Namespace:
            vars(target).update(state)
        elif type(target) is collections.OrderedDict:
            vars(target).update({key: value for key, value in state.items() if key == "_metadata"})
        else:
            raise UnsafeError(f"the state of a {type(target).__name__}")


def _operations() -> Iterator[tuple[bytes, Callable[[Unpickler], object]]]:
    """Operation -> what it does."""
    yield pickle.PROTO, lambda u: u.read(1)
    for code, value in ((pickle.NONE, None), (pickle.NEWTRUE, True), (pickle.NEWFALSE, False)):
        yield code, lambda u, value=value: u.push(value)
    for code, kind in ((pickle.EMPTY_TUPLE, tuple), (pickle.EMPTY_LIST, list), (pickle.EMPTY_DICT, dict)):
        yield code, lambda u, kind=kind: u.push(kind())
    for code, form in ((pickle.BININT, "<i"), (pickle.BININT1, "<B"), (pickle.BININT2, "<H"), (pickle.BINFLOAT, ">d")):
        yield code, lambda u, form=form: u.push(u.number(form))
    yield pickle.LONG1, lambda u: u.push(pickle.decode_long(u.read(u.number("<B"))))
    yield pickle.BINUNICODE, lambda u: u.push(u.read(u.number("<I")).decode("utf-8", "surrogatepass"))
    yield pickle.SHORT_BINSTRING, lambda u: u.push(u.read(u.number("<B")).decode())
    yield pickle.MARK, lambda u: u.mark()
    yield pickle.TUPLE, lambda u: u.push(tuple(u.group()))
    for code, count in ((pickle.TUPLE1, 1), (pickle.TUPLE2, 2), (pickle.TUPLE3, 3)):
        yield code, lambda u, count=count: u.push(u.pop_tuple(count))
    yield pickle.APPEND, lambda u: u.extend([u.pop()])
    yield pickle.APPENDS, lambda u: u.extend(u.group())
    yield pickle.SETITEM, lambda u: u.update(list(u.pop_tuple(2)))
    yield pickle.SETITEMS, lambda u: u.update(u.group())
    yield pickle.GLOBAL, lambda u: u.push(named(u.line(), u.line()))
    yield pickle.REDUCE, lambda u: u.call()
    yield pickle.NEWOBJ, lambda u: u.call()
    yield pickle.BUILD, lambda u: u.build()
    yield pickle.BINPERSID, lambda u: u.refer()
    for code, form in ((pickle.BINPUT, "<B"), (pickle.LONG_BINPUT, "<I")):
        yield code, lambda u, form=form: u.remember(u.number(form))
    for code, form in ((pickle.BINGET, "<B"), (pickle.LONG_BINGET, "<I")):
        yield code, lambda u, form=form: u.recall(u.number(form))


_OPERATIONS = dict(_operations())


def _plain(value: Any) -> Any:
    """The value, if no name of a function is in it and no values without their tensor. Keys are plain already."""
    waiting: list[Any] = [value]
    seen: set[int] = set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Name | Stored):
            raise UnsafeError(item.name if isinstance(item, Name) else "values that are no tensor")
        if isinstance(item, _PLAIN) or id(item) in seen:
            continue
        seen.add(id(item))
        waiting += vars(item).values() if isinstance(item, argparse.Namespace | collections.OrderedDict) else ()
        waiting += item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
    return value
