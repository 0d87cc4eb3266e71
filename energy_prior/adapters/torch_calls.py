"""What a pickle of torch.save may name and call: tensors, their kinds, and containers of plain values."""

from __future__ import annotations

__all__ = ["CALLS", "COPIES", "Name", "Stored", "UnsafeError", "bytes_each", "key_of", "kind_of", "named", "text_of", "whole"]

import argparse
import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from energy_prior._util import shown

_LETTERS = 100
_KINDS = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}
_UNTYPED = ("torch.UntypedStorage", "torch.storage.UntypedStorage")
_TENSOR_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter")


class UnsafeError(ValueError):
    """A pickle asks for something that is no tensor and no plain value.

    Attributes:
        name: what it asks for.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True)
class Name:
    """A function or class that a pickle names: nothing but its name."""

    name: str


@dataclass(frozen=True)
class Stored:
    """The values of one or more tensors.

    Attributes:
        values: all of them, as bytes.
        dtype: of a number; None where the tensor says it.
        first: index of the first number that counts.
        count: how many do.
    """

    values: Tensor
    dtype: torch.dtype | None
    first: int
    count: int


def named(module: str, name: str) -> Any:
    """What stands for a function, class or dtype.

    Raises:
        UnsafeError: if it is none that a pickle may name.
    """
    full = f"{module.replace('__builtin__', 'builtins')}.{name}"
    if full in CALLS or full in (*_UNTYPED, *_TENSOR_TYPES) or (module == "torch" and name in _KINDS):
        return Name(full)
    dtype = vars(torch).get(name) if module == "torch" else None
    if isinstance(dtype, torch.dtype):
        return dtype
    raise UnsafeError(full)


def key_of(value: Any) -> Any:
    """A key of a dict or an element of a set: plain, or a tuple of plain ones. The hash of deep tuples would need a deep stack.

    Raises:
        ValueError: if it is anything else.
    """
    plain = str | bytes | int | float | complex | None
    if not isinstance(value, plain) and not (type(value) is tuple and all(isinstance(item, plain) for item in value)):
        raise ValueError(f"a {type(value).__name__} is a key")
    return value


def whole(value: Any) -> int:
    """A size or an index.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{shown(value)} is no size")
    return value


def text_of(value: Any) -> str:
    """Text.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is no text")
    return value


def kind_of(kind: Any) -> torch.dtype | None:
    """The dtype of a storage class; None for one of bytes.

    Raises:
        UnsafeError: if it is none.
    """
    name = kind.name if isinstance(kind, Name) else shown(kind)
    if name in _UNTYPED:
        return None
    if name.removeprefix("torch.") not in _KINDS:
        raise UnsafeError(name)
    return _KINDS[name.removeprefix("torch.")]


def bytes_each(kind: Any) -> int:
    """The bytes of a number of a storage class."""
    dtype = kind_of(kind)
    return 1 if dtype is None else dtype.itemsize


# --------------------------------------------------------------------------------------------------------------------- calls


def _tensor(
    stored: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, metadata: Any = None
) -> Tensor:
    dtype = stored.dtype if isinstance(stored, Stored) else None
    return _tensor_of(stored, offset, size, stride, requires_grad, hooks, dtype, metadata)


def _tensor_of(
    stored: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Tensor:
    if not isinstance(stored, Stored) or not isinstance(dtype, torch.dtype) or metadata:
        raise ValueError("a tensor has no values, or is of an unknown kind")
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride):
        raise ValueError("a tensor has no shape")
    sizes, strides, first = [whole(n) for n in size], [whole(n) for n in stride], whole(offset)
    last = first + sum((n - 1) * step for n, step in zip(sizes, strides))
    count = stored.count if stored.dtype is not None else stored.count // dtype.itemsize
    if first > count or (0 not in sizes and last >= count):
        raise ValueError("a tensor is outside of its values")
    made = torch.empty(0, dtype=dtype)
    made.set_(stored.values.untyped_storage(), stored.first + first, tuple(sizes), tuple(strides))
    return made.requires_grad_(bool(requires_grad))


def _parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> nn.Parameter:
    if type(data) is not Tensor:
        raise ValueError("a parameter is no tensor")
    return nn.Parameter(data, bool(requires_grad))


def _of_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes, which are left out."""
    for name, known in ((function, tuple(_TENSORS)), (kind, _TENSOR_TYPES)):
        if not isinstance(name, Name) or name.name not in known:
            raise UnsafeError(name.name if isinstance(name, Name) else shown(name))
    if not isinstance(arguments, tuple):
        raise ValueError("a tensor has no values")
    return _TENSORS[function.name](*arguments)


def _namespace() -> argparse.Namespace:
    return argparse.Namespace()


def _encoded(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise UnsafeError(f"text in the encoding {shown(encoding)}")
    return text_of(text).encode("latin1")


def _bytes() -> bytes:
    return b""


def _changeable_bytes(text: Any = "", encoding: Any = "latin1") -> bytearray:
    return bytearray(text if isinstance(text, bytes) else _encoded(text, encoding))


def _ordered(items: Any = ()) -> collections.OrderedDict[Any, Any]:
    made: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    for key, value in items if isinstance(items, list | tuple) else ():
        made[key_of(key)] = value
    return made


def _counts(items: Any) -> collections.Counter[Any]:
    return collections.Counter(items if isinstance(items, dict) else {})


def _elements(items: Any) -> set[Any]:
    return {key_of(item) for item in (items if isinstance(items, list | tuple) else ())}


def _shape(sizes: Any) -> torch.Size:
    return torch.Size([whole(n) for n in (sizes if isinstance(sizes, list | tuple) else ())])


def _device(name: Any, index: Any = None) -> torch.device:
    return torch.device(text_of(name)) if index is None else torch.device(text_of(name), whole(index))


_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
CALLS: dict[str, Callable[..., Any]] = _TENSORS | {
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": _shape,
    "torch.device": _device,
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counts,
    "argparse.Namespace": _namespace,
    "builtins.set": _elements,
    "builtins.complex": complex,
    "builtins.bytearray": _changeable_bytes,
    "builtins.bytes": _bytes,
    "_codecs.encode": _encoded,
}
"""Name in a pickle -> what is called for it."""

COPIES = {"collections.OrderedDict": 1, "collections.Counter": 1, "builtins.set": 1, "torch.Size": 1} | {
    "builtins.bytearray": _LETTERS,
    "_codecs.encode": _LETTERS,
}
"""Calls that copy what they get -> how many elements of it take as much memory as an empty container."""
