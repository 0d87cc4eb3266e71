"""Small helpers that several modules share: random numbers, frozen modules, argument checks."""

from __future__ import annotations

__all__ = [
    "check_count",
    "check_device",
    "check_positive",
    "check_settings",
    "draw",
    "evaluating",
    "frozen",
    "is_whole",
    "inferrer",
    "normal_like",
    "plain_normal",
    "reproducible",
    "require_extra",
    "sum_event",
    "there",
    "training_mode",
    "unvalidated",
]

import contextlib
import dataclasses
import difflib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from energy_prior.errors import ArgumentError, MissingExtraError

_T = TypeVar("_T")


def there(value: _T | None) -> _T:
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


@contextlib.contextmanager
def reproducible(rng: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Everything inside draws from a stream seeded by `rng`; torch's global streams are left as they were.

    With `rng` None the code inside draws from the global streams. Public methods open this once, so that all the code
    below them, the user's `infer` and distributions included, obeys `rng` without passing it on.
    """
    if rng is None:
        yield
        return
    if not isinstance(rng, torch.Generator):
        raise ArgumentError(f"rng: expected a torch.Generator or None, got {type(rng).__name__}.")
    seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU, also those not forked
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def unvalidated() -> Iterator[None]:
    """No checks inside torch.distributions, which would sync with the host at every construction; restored on exit."""
    validate = Distribution._validate_args
    try:
        Distribution.set_default_validate_args(False)
        yield
    finally:
        Distribution.set_default_validate_args(validate)


@contextlib.contextmanager
def evaluating(*modules: Any) -> Iterator[None]:
    """Evaluation mode and no per-call distribution checks; both restored on exit, also after an error."""
    with _evaluating(_parts(modules)), unvalidated():
        yield


@contextlib.contextmanager
def training_mode(module: nn.Module) -> Iterator[None]:
    """Training mode; every part's own flag is restored on exit, also after an error."""
    with _restored(list(module.modules()), "training"):
        module.train()
        yield


@contextlib.contextmanager
def frozen(*modules: Any) -> Iterator[None]:
    """`evaluating`, and no parameter takes part in autograd; all restored on exit, also after an error."""
    parts = _parts(modules)
    parameters = [p for part in parts for p in part._parameters.values() if p is not None]
    with _evaluating(parts), unvalidated(), _restored(parameters, "requires_grad"):
        for p in parameters:
            if p.requires_grad:
                p.requires_grad_(False)
        yield


def _parts(modules: Sequence[Any]) -> list[nn.Module]:
    """All modules inside of these, those that are none left out."""
    return [part for module in modules if isinstance(module, nn.Module) for part in module.modules()]


@contextlib.contextmanager
def _evaluating(parts: Sequence[nn.Module]) -> Iterator[None]:
    with _restored(parts, "training"):
        for part in parts:
            if part.training:  # writing to a module is slow, and a deep model has hundreds
                part.training = False
        yield


@contextlib.contextmanager
def _restored(things: Sequence[Any], flag: str) -> Iterator[None]:
    """Puts a flag back to what it was, also after an error."""
    before = [getattr(thing, flag) for thing in things]
    try:
        yield
    finally:
        for thing, value in zip(things, before, strict=True):
            if getattr(thing, flag) != value:
                setattr(thing, flag, value)


def first_line(error: Exception) -> str:
    """The first line of an error's message with something in it, for a message of ours; its type where there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def inferrer(generator: Any) -> Callable[..., Any] | None:
    """The generator's `infer`, or None if it has none."""
    infer = getattr(generator, "infer", None)
    return infer if callable(infer) else None


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
