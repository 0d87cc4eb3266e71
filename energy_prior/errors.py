"""Errors that say which argument was wrong, what was expected, what came and what to do."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "BackendWarning",
    "ChainWarning",
    "CheckpointError",
    "DataWarning",
    "DistributedError",
    "DivergenceError",
    "EnergyPriorError",
    "GeneratorError",
    "HubError",
    "MissingExtraError",
    "ShapeError",
    "TrainingWarning",
    "called_from",
    "origin",
    "warn",
]

import sys
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

_PACKAGE = str(Path(__file__).parent)


class EnergyPriorError(Exception):
    """Base class of every error that this library raises on purpose."""


class ArgumentError(EnergyPriorError, ValueError):
    """An argument has an impossible value: out of range, of the wrong dtype, device or name, or not finite."""


class ShapeError(EnergyPriorError, ValueError):
    """A tensor has the wrong shape."""


class GeneratorError(EnergyPriorError, ValueError):
    """A generator breaks the protocol (see `energy_prior.check_generator`)."""


class CheckpointError(EnergyPriorError, ValueError):
    """A checkpoint is truncated, foreign, of a future version, or belongs to another model."""


class HubError(EnergyPriorError, OSError):
    """The Hugging Face hub refuses, or is out of reach; the message says what it was asked."""


class DistributedError(EnergyPriorError, RuntimeError):
    """Another process of a run on several has died or is out of reach."""


class TrainingWarning(UserWarning):
    """Something in a run of training is about to go wrong; the message says what and what to change."""


class ChainWarning(UserWarning):
    """A Langevin chain hardly moved; the message says what to change."""


class DataWarning(UserWarning):
    """Data may not be what they should: out of the generator's range, left out, trained on; the message says what was seen."""


class BackendWarning(UserWarning):
    """A faster backend of the Langevin sampler cannot be used here; the message says why and what is used instead."""


class MissingExtraError(EnergyPriorError, ImportError):
    """An optional dependency is not installed; the message names the `pip install` that brings it."""


class DivergenceError(EnergyPriorError, ArithmeticError):
    """A density, gradient, loss or state stopped being finite.

    Args:
        message: what stopped, and what to do.
        layer: number of the layer at fault (1 is nearest the data); None where it cannot be told apart.
        step: Langevin step or training iteration at which it was first seen (0 is the start); None where it is of none.

    Attributes:
        layer: number of the layer at fault (1 is nearest the data); `None` where it cannot be told apart.
        step: Langevin step or training iteration at which it was first seen (0 is the start).
    """

    def __init__(self, message: str, *, layer: int | None = None, step: int | None = None) -> None:
        super().__init__(message)
        self.layer = layer
        self.step = step


# ----------------------------------------------------------------------------------------------------------------- warnings


class Origin(NamedTuple):
    """A line of the user's that called into the library."""

    file: str
    line: int
    module: str
    registry: dict[Any, Any]


origin: ContextVar[Origin | None] = ContextVar("energy_prior_origin", default=None)
"""Where the call came from that a thread of the library works for; None in the user's own threads."""


def called_from() -> Origin:
    """The line that called into the library: the caller of the outermost frame that is in it."""
    known = origin.get()
    if known is not None:
        return known
    frame: Any = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    outermost = frame
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            outermost = frame
        frame = frame.f_back
    user = outermost.f_back or outermost
    name = user.f_globals.get("__name__", "__main__")
    return Origin(user.f_code.co_filename, user.f_lineno, name, user.f_globals.setdefault("__warningregistry__", {}))


def warn(message: str, category: type[Warning]) -> None:
    """Warns, at the line of the user's that called into the library."""
    at = called_from()
    warnings.warn_explicit(message, category, at.file, at.line, at.module, at.registry)
