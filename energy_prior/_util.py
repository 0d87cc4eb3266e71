"""Small helpers that every part of the library may use."""

from __future__ import annotations

__all__ = [
    "draw",
    "eight_bit",
    "first_line",
    "normal_like",
    "not_none",
    "per_row",
    "plain",
    "plain_normal",
    "resized",
    "shortened",
    "shown",
    "some_of",
    "sum_event",
]

import reprlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

_T = TypeVar("_T")


def not_none(value: _T | None) -> _T:
    """A value that is there by what the code around it has made sure of."""
    assert value is not None  # noqa: S101
    return value


def sum_event(values: Tensor) -> Tensor:
    """Sum over everything but the batch: (batch, …) -> (batch,)."""
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """A scalar or one value for each row, (batch,), shaped to multiply `like` of shape (batch, …)."""
    return values.reshape(-1, *([1] * (like.ndim - 1))) if values.ndim else values


def normal_like(shape: Sequence[int], reference: Tensor) -> Tensor:
    """Standard normal noise of this shape, with the dtype and device of `reference`."""
    return torch.randn(tuple(shape), dtype=reference.dtype, device=reference.device)


def plain(value: Tensor) -> Tensor:
    """The same values where autograd may save them for a backward pass, which it refuses for tensors of inference mode."""
    return value.clone() if value.is_inference() else value


def plain_normal(loc: Tensor, scale: Tensor) -> Normal:
    """N(loc, scale²), without checks that would wait for a GPU."""
    return Normal(loc, scale, validate_args=False)


def resized(h: Tensor, size: tuple[int, int]) -> Tensor:
    """A map of this height and width: nearest neighbours of a coarser one, means of a finer one."""
    if tuple(h.shape[2:]) == size:
        return h
    if h.shape[2] <= size[0] and h.shape[3] <= size[1]:
        return F.interpolate(h, size=size, mode="nearest")
    return F.adaptive_avg_pool2d(h, size)


def eight_bit(x: Tensor) -> Tensor:
    """Images in [0, 1] as 8-bit numbers, (n, height, width) of grey ones and (n, height, width, 3) of others, on the CPU."""
    values = (x.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return values[:, 0] if x.shape[1] == 1 else values.movedim(1, 3).contiguous()


def draw(q: Normal) -> tuple[Tensor, Tensor]:
    """z ~ q, reparameterised, and log q(z), (batch,), nats."""
    z = q.loc + q.scale * normal_like(q.loc.shape, q.loc)
    return z, sum_event(q.log_prob(z))


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 4
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 20
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 500


def shortened(text: str, letters: int = 100) -> str:
    """Text for a message: what comes from a file may be of any length."""
    return text if len(text) <= letters else f"{text[:letters]}…"


def shown(value: object, letters: int = 100) -> str:
    """A value for a message, as `repr` writes it, shortened, whatever it holds: itself twice, say, at each of many levels."""
    try:
        return shortened(_SHORT.repr(value), letters)
    except (ValueError, RecursionError):  # whole numbers of thousands of digits; very deep lists
        return f"a {type(value).__name__}"


def some_of(names: Iterable[str], shown: int = 5) -> str:
    """The first few names, for a message."""
    every = list(names)
    return ", ".join(every[:shown]) + (", …" if len(every) > shown else "")


def first_line(error: Exception) -> str:
    """The first line of an error's message with something in it, for a message of ours; its type where there is none."""
    return shortened(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__), 200)
