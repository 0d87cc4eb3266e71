"""Checks of settings: numbers of any kind as Python's own, flags, paths, names, optional packages."""

from __future__ import annotations

__all__ = [
    "check_count",
    "check_device",
    "check_layers",
    "check_flag",
    "check_not_negative",
    "check_path",
    "check_positive",
    "check_settings",
    "check_shape",
    "check_share",
    "check_sizes",
    "real_number",
    "require_extra",
    "whole_number",
]

import dataclasses
import difflib
import importlib
import math
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from energy_prior._util import first_line, shortened, shown
from energy_prior.errors import ArgumentError, MissingExtraError, ShapeError

_LARGEST_SIZE = 2**63 - 1


def check_count(name: str, value: Any, *, least: int = 1) -> int:
    """A whole number of at least `least`, of any kind (numpy's, a tensor with one element), as Python's own."""
    number = whole_number(value)
    if number is None or number < least:
        raise ArgumentError(f"{name}: expected a whole number of at least {least}, got {shown(value)}.")
    return number


def check_sizes(name: str, values: Any, *, least: int = 1) -> tuple[int, ...]:
    """Whole numbers of at least `least`, from any iterable of any kind of integers, as Python's own."""
    found = _elements(values)
    if found is None:
        raise ArgumentError(f"{name}: expected a sequence of whole numbers, got {shown(values)}.")
    return tuple(check_count(name, value, least=least) for value in found)


def check_shape(name: str, values: Any) -> torch.Size:
    """A shape without the batch: one or more sizes of at least 1, from any iterable of any kind of integers."""
    found = _elements(values)
    sizes = [whole_number(value) or 0 for value in found or ()]
    if not sizes or min(sizes) < 1 or max(sizes) > _LARGEST_SIZE:
        raise ShapeError(f"{name}: expected one or more positive sizes, got {shown(values if found is None else found)}.")
    return torch.Size(sizes)


def whole_number(value: Any) -> int | None:
    """An integer of any kind as Python's own; None if it is anything else, a bool among it."""
    if isinstance(value, Tensor):
        whole = value.ndim == 0 and not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
        return int(value) if whole else None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array that is not a single integer
        return None


def real_number(value: Any) -> float | None:
    """A finite number of any kind as Python's float; None if it is anything else, a bool or text among it."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__") or getattr(value, "ndim", 0) != 0:
        return None
    if "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def check_positive(name: str, value: Any) -> float:
    """A finite number above 0, of any kind, as Python's own."""
    number = real_number(value)
    if number is None or number <= 0:
        raise ArgumentError(f"{name}: expected a finite number above 0, got {shown(value)}.")
    return number


def check_not_negative(name: str, value: Any) -> float:
    """A finite number of at least 0, of any kind, as Python's own."""
    number = real_number(value)
    if number is None or number < 0:
        raise ArgumentError(f"{name}: expected a finite number of at least 0, got {shown(value)}.")
    return number


def check_share(name: str, value: Any) -> float:
    """A number between 0 and 1, of any kind, as Python's own."""
    number = real_number(value)
    if number is None or not 0 < number < 1:
        raise ArgumentError(f"{name}: expected a number between 0 and 1, got {shown(value)}.")
    return number


def check_flag(name: str, value: Any) -> bool:
    """True or False, numpy's too."""
    if not isinstance(value, bool) and "numpy.bool" not in str(type(value)):
        raise ArgumentError(f"{name}: expected True or False, got {shown(value)}.")
    return bool(value)


def check_path(name: str, value: Any) -> Path:
    """A path of the user's, with `~` for the home folder; not empty."""
    if not isinstance(value, str | os.PathLike):
        raise ArgumentError(f"{name}: expected a path, got {type(value).__name__}.")
    if not isinstance(os.fspath(value), str):
        raise ArgumentError(f"{name}: expected a path, got one of bytes.")
    if not os.fspath(value):
        raise ArgumentError(f"{name}: expected a path, got an empty text.")
    if "\0" in os.fspath(value):
        raise ArgumentError(f"{name}: expected a path, got {shown(value)}, which holds the character 0.")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # ~nobody
        raise ArgumentError(f"{name}: {os.fspath(value)!r} names no home folder that is known here.") from error


def check_device(name: str, value: str) -> str:
    """The name of a device that can be used here."""
    try:
        torch.zeros(1, device=value).tolist()
    except Exception as error:  # of whatever would have to be there for such a device
        raise ArgumentError(f"{name} {shortened(value)}: not available here ({first_line(error)}).") from error
    return value


def check_layers(name: str, value: Any, layers: int) -> tuple[int, ...]:
    """Numbers of one or more layers, from 1 to L, ascending."""
    numbers = [whole_number(v) for v in _elements(value) or ()]
    found = sorted({v for v in numbers if v is not None and 1 <= v <= layers})
    if not numbers or len(found) < len(numbers):
        raise ArgumentError(
            f"{name}: expected one or more different layers, by their numbers from 1 (nearest the data) to {layers}, got "
            f"{shown(value)}."
        )
    return tuple(found)


def check_settings(kind: type[Any], given: Mapping[str, Any], what: str) -> None:
    """Every name is a field of the dataclass `kind`; else the nearest one is suggested."""
    if not isinstance(given, Mapping):
        raise ArgumentError(f"options: expected a dict whose every name is {what}, got {type(given).__name__}.")
    known = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known)}."
            raise ArgumentError(f"{shortened(str(name))}: not {what}. {hint}")


def require_extra(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency, or says which `pip install` brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is not installed; it comes with the extra '{extra}': pip install \"energy-prior[{extra}]\"."
        ) from error


def _elements(values: Any) -> tuple[Any, ...] | None:
    """The elements of an iterable; None if it is text, or cannot be iterated (arrays and tensors without dimensions too)."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        return None
    return tuple(values)
