"""Small helpers that several modules share: random numbers, frozen modules, argument checks."""

from __future__ import annotations

__all__ = [
    "check_count",
    "check_device",
    "check_positive",
    "check_settings",
    "draw",
    "is_whole",
    "normal_like",
    "not_none",
    "plain_normal",
    "require_extra",
    "sum_event",
]

import dataclasses
import difflib
import importlib
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Normal

from energy_prior.errors import ArgumentError, MissingExtraError

_T = TypeVar("_T")


def not_none(value: _T | None) -> _T:
    """A value that is there by what the code around it has made sure of."""
    assert value is not None  # noqa: S101
    return value


def sum_event(values: Tensor) -> Tensor:
    """Sum over everything but the batch: (batch, …) -> (batch,)."""
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def normal_like(shape: Sequence[int], reference: Tensor) -> Tensor:
    """Standard normal noise of this shape, with the dtype and device of `reference`."""
    return torch.randn(tuple(shape), dtype=reference.dtype, device=reference.device)


def plain_normal(loc: Tensor, scale: Tensor) -> Normal:
    """N(loc, scale²), without checks that would wait for a GPU."""
    return Normal(loc, scale, validate_args=False)


def draw(q: Normal) -> tuple[Tensor, Tensor]:
    """z ~ q, reparameterised, and log q(z), (batch,), nats."""
    z = q.loc + q.scale * normal_like(q.loc.shape, q.loc)
    return z, sum_event(q.log_prob(z))


def first_line(error: Exception) -> str:
    """The first line of an error's message with something in it, for a message of ours; its type where there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_count(name: str, value: Any, *, least: int = 1) -> int:
    """A whole number of at least `least`."""
    if not is_whole(value) or value < least:
        raise ArgumentError(f"{name}: expected a whole number of at least {least}, got {value!r}.")
    return int(value)


def check_device(name: str, value: str) -> str:
    """The name of a device that can be used here."""
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"{name} {value}: not available here ({first_line(error)}).") from error
    return value


def is_whole(value: Any) -> bool:
    """Whether this is an integer of any kind (numpy's too), but not a bool."""
    return hasattr(value, "__index__") and not isinstance(value, bool | Tensor)


def check_positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    number = float(value) if hasattr(value, "__float__") else math.nan
    if not (math.isfinite(number) and number > 0):
        raise ArgumentError(f"{name}: expected a finite number above 0, got {value!r}.")
    return number


def check_settings(kind: type[Any], given: Mapping[str, Any], what: str) -> None:
    """Every name is a field of the dataclass `kind`; else the nearest one is suggested."""
    known = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known)}."
            raise ArgumentError(f"{name}: not {what}. {hint}")


def require_extra(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency, or says which `pip install` brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is not installed; it comes with the extra '{extra}': pip install \"energy-prior[{extra}]\"."
        ) from error
