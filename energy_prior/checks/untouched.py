"""A check leaves no trace: tensors, flags, attributes and random streams are put back as they were."""

from __future__ import annotations

__all__ = ["Snapshot", "untouched"]

import contextlib
import functools
import random
import sys
from collections.abc import Generator, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """What some objects hold: tensors by value, containers and attributes by identity.

    Args:
        things: modules, other generators, and functions, of which the modules that they use are meant.
    """

    def __init__(self, things: tuple[Any, ...]) -> None:
        self._seen: set[int] = set()
        self._tensors: list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        for thing in things:
            if _is_function(thing):
                for module in _modules_of(thing, set()):
                    self._take(module)
            else:
                self._take(thing, attributes=True)

    def parameters_changed(self) -> bool:
        """Whether a parameter has another value now."""
        return any(isinstance(t, nn.Parameter) and not _equal(t, value) for t, _, value, *_ in self._tensors)

    def restore(self) -> None:
        """Puts everything back."""
        for current, kept in self._dicts:
            if current.keys() != kept.keys() or any(current[key] is not kept[key] for key in kept):
                current.clear()
                current.update(kept)
        for current, kept in self._lists:
            current[:] = kept
        for current, kept in self._sets:
            current.clear()
            current.update(kept)
        for tensor, data, value, grad, grad_value, requires_grad in self._tensors:
            if not _equal(tensor, value):
                with torch.no_grad():
                    if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
                        tensor.data = data
                    tensor.data.copy_(value)
            if tensor.is_leaf:
                if tensor.requires_grad != requires_grad:
                    tensor.requires_grad_(requires_grad)
                tensor.grad = grad
                if grad is not None and grad_value is not None:
                    grad.copy_(grad_value)

    def _take(self, value: Any, attributes: bool = False) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            if nn.parameter.is_lazy(value) or value.is_inference():
                return
            grad = value.grad if value.is_leaf else None
            kept = None if grad is None else grad.detach().clone()
            self._tensors.append((value, value.detach(), value.detach().clone(), grad, kept, value.requires_grad))
        elif isinstance(value, dict):
            self._dicts.append((value, dict(value)))
            for part in value.values():
                self._take(part)
        elif isinstance(value, list):
            self._lists.append((value, list(value)))
            for part in value:
                self._take(part)
        elif isinstance(value, set):
            self._sets.append((value, set(value)))
        elif isinstance(value, tuple):
            for part in value:
                self._take(part)
        elif isinstance(value, nn.Module | SimpleNamespace) or (attributes and hasattr(value, "__dict__")):
            self._take(value.__dict__)


@contextlib.contextmanager
def untouched(*things: Any) -> Generator[Snapshot]:
    """Restores what `things` hold on exit, also after an error, with Python's and NumPy's random streams."""
    snapshot = Snapshot(tuple(thing for thing in things if thing is not None))
    numpy: Any = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield snapshot
    finally:
        snapshot.restore()
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def _is_function(thing: Any) -> bool:
    return hasattr(thing, "__code__") or hasattr(thing, "__func__") or isinstance(thing, functools.partial)


def _modules_of(thing: Any, seen: set[int]) -> Iterator[nn.Module]:
    """The modules that a function uses, itself or by other functions: it is their method, closes over them, or names them."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        yield thing
    elif isinstance(thing, functools.partial):
        for part in (thing.func, *thing.args, *thing.keywords.values()):
            yield from _modules_of(part, seen)
    elif _is_function(thing):
        function = getattr(thing, "__func__", thing)
        used = [getattr(thing, "__self__", None), *(getattr(function, "__globals__", {}).get(n) for n in _names_in(function))]
        for cell in getattr(function, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                used.append(cell.cell_contents)
        for part in used:
            yield from _modules_of(part, seen)


def _names_in(function: Any) -> tuple[str, ...]:
    code = getattr(function, "__code__", None)
    return () if code is None else code.co_names


def _equal(tensor: Tensor, value: Tensor) -> bool:
    """Bit for bit, NaN included."""
    if tensor.shape != value.shape or tensor.dtype != value.dtype:
        return False
    tensor = tensor.detach()
    return bool(torch.equal(tensor, value)) or (value.is_floating_point() and bool(torch.allclose(tensor, value, 0, 0, True)))
