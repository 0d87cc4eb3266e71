"""What the state in a checkpoint of a run must look like: it is compared with a pattern before anything is taken from it."""

from __future__ import annotations

__all__ = [
    "Each",
    "Either",
    "Given",
    "Optional",
    "Such",
    "named_like",
    "number",
    "positive",
    "random_stream",
    "tensor",
    "unlike",
    "whole",
]

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from energy_prior._util import shortened, shown


@dataclass(frozen=True)
class Such:
    """A pattern that a function decides on.

    Attributes:
        holds: whether a value is as it should be.
        what: what is expected, in words.
    """

    holds: Callable[[Any], bool]
    what: str


@dataclass(frozen=True)
class Each:
    """A list or a dict, of any length from `least` on, whose values are all like one pattern.

    Attributes:
        kind: list or dict.
        like: the pattern.
        least: the fewest values.
    """

    kind: type[Any]
    like: Any
    least: int = 0


@dataclass(frozen=True)
class Either:
    """One of several patterns.

    Attributes:
        likes: the patterns; what is wrong is said of the last one.
    """

    likes: tuple[Any, ...]


@dataclass(frozen=True)
class Optional:
    """An entry of a dict that need not be there.

    Attributes:
        like: the pattern, where it is.
    """

    like: Any


@dataclass(frozen=True)
class Given:
    """A dict with these entries, and others.

    Attributes:
        likes: key -> pattern.
    """

    likes: dict[str, Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


number: Such = Such(_is_number, "a number")
positive: Such = Such(lambda v: _is_number(v) and 0 < v < math.inf, "a finite number above 0")
tensor: Such = Such(lambda v: isinstance(v, Tensor), "a tensor")


def whole(below: float = math.inf) -> Such:
    """A whole number from 0 on, below this."""
    return Such(lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < below, "a whole number in its range")


def _is_stream(value: Any) -> bool:
    try:
        torch.Generator(device="cpu").set_state(value.cpu())
    except (AttributeError, TypeError, RuntimeError):
        return False
    return True


random_stream: Such = Such(_is_stream, "the state of a random stream on the CPU")


def named_like(module: nn.Module) -> dict[str, Any]:
    """The pattern of a module's state dict; what `get_extra_state` gives may be a tensor of any shape."""
    return {name: tensor if name.endswith("_extra_state") else value for name, value in module.state_dict().items()}


def unlike(got: Any, like: Any, where: str = "state") -> str | None:
    """What first differs from a pattern, in words; None: nothing does.

    A tensor in the pattern stands for one of its shape and dtype, whose values are finite unless its own are not; a dict for
    one of the same keys, a list or tuple for a list of the same length; anything else for itself.

    Args:
        got: what was read.
        like: the pattern.
        where: what `got` is called.
    """
    if isinstance(like, Such):
        return None if like.holds(got) else f"{where} is {_named(got)} instead of {like.what}"
    if isinstance(like, Tensor):
        return _unlike_tensor(got, like, where)
    if isinstance(like, Either):
        faults = [unlike(got, one, where) for one in like.likes]
        return None if None in faults else faults[-1]
    if isinstance(like, Each):
        if not isinstance(got, like.kind) or len(got) < like.least:
            return f"{where} is {_named(got)} instead of a {like.kind.__name__} of at least {like.least}"
        return _first((got[key], like.like, f"{where}/{key}") for key in (got if like.kind is dict else range(len(got))))
    if isinstance(like, Given | dict):
        wanted = like.likes if isinstance(like, Given) else like
        if not isinstance(got, dict):
            return f"{where} is {_named(got)} instead of a dict"
        missing = [key for key, one in wanted.items() if key not in got and not isinstance(one, Optional)]
        more = [key for key in got if key not in wanted and isinstance(like, dict)]
        if missing or more:
            return f"{where} " + (f"lacks {missing[0]}" if missing else f"has {shortened(str(more[0]))}, which is not expected")
        plain = {key: one.like if isinstance(one, Optional) else one for key, one in wanted.items()}
        return _first((got[key], one, f"{where}/{key}") for key, one in plain.items() if key in got)
    if isinstance(like, list | tuple):
        if not isinstance(got, list) or len(got) != len(like):
            return f"{where} is {_named(got)} instead of a list of {len(like)}"
        return _first((item, one, f"{where}/{i}") for i, (item, one) in enumerate(zip(got, like, strict=True)))
    return None if type(got) is type(like) and got == like else f"{where} is {_named(got)} instead of {like!r}"


def _first(parts: Any) -> str | None:
    return next((fault for part in parts if (fault := unlike(*part)) is not None), None)


def _named(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {shown(tuple(value.shape))}"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, list | dict) else shown(value)


def _unlike_tensor(got: Any, like: Tensor, where: str) -> str | None:
    if not isinstance(got, Tensor) or (got.shape, got.dtype) != (like.shape, like.dtype):
        return f"{where} is {_named(got)} instead of {_named(like)}"
    if like.is_floating_point() and not bool(torch.isfinite(got).all()) and bool(torch.isfinite(like).all()):
        return f"{where} is not finite"
    return None
