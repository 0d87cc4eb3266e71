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
    """Base class of every error that this library raises on purpose.

    Examples:
        >>> from energy_prior import load_example
        >>> try:
        ...     load_example().sample(0)
        ... except EnergyPriorError as error:
        ...     print(error)
        n: expected a whole number of at least 1, got 0.
    """


class ArgumentError(EnergyPriorError, ValueError):
    """An argument has an impossible value: out of range, of the wrong dtype, device or name, or not finite.

    Examples:
        >>> from energy_prior import ChainSettings
        >>> ChainSettings(temperature=0)
        Traceback (most recent call last):
            ...
        energy_prior.errors.ArgumentError: temperature: expected a finite number above 0, got 0.
    """


class ShapeError(EnergyPriorError, ValueError):
    """A tensor has the wrong shape.

    Examples:
        >>> import torch
        >>> from energy_prior import LadderVAE
        >>> LadderVAE((1, 8, 8)).infer(torch.rand(4, 8, 8))
        Traceback (most recent call last):
            ...
        energy_prior.errors.ShapeError: x: expected shape (batch, 1, 8, 8), got (4, 8, 8).
    """


class GeneratorError(EnergyPriorError, ValueError):
    """A generator breaks the protocol (see `energy_prior.check_generator`).

    Examples:
        >>> from torch import nn
        >>> from energy_prior import JointEBMPrior
        >>> JointEBMPrior(nn.Linear(2, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        energy_prior.errors.GeneratorError: generator: Linear lacks latent_shapes, start, conditional, descend, likelihood; ...
    """


class CheckpointError(EnergyPriorError, ValueError):
    """A checkpoint is truncated, foreign, of a future version, or belongs to another model.

    Examples:
        >>> from torch import nn
        >>> from energy_prior.adapters import load_weights
        >>> load_weights(nn.Linear(2, 3), {"weight": nn.Linear(2, 3).weight})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        energy_prior.errors.CheckpointError: 'the checkpoint' does not fit this Linear: 1 of 2 names are there. ...
    """


class HubError(EnergyPriorError, OSError):
    """The Hugging Face hub refuses, or is out of reach; the message says what it was asked.

    Examples:
        >>> from energy_prior import JointEBMPrior, load_example
        >>> try:
        ...     prior = JointEBMPrior.from_pretrained("no/such-prior", local_files_only=True)
        ... except HubError:  # it was not downloaded before
        ...     prior = load_example("digits")
        >>> prior.x_shape
        torch.Size([1, 8, 8])
    """


class DistributedError(EnergyPriorError, RuntimeError):
    """Another process of a run on several has died or is out of reach.

    Examples:
        >>> from energy_prior import load_example, map_batches
        >>> try:
        ...     samples = map_batches(load_example().sample, 6, steps=5)
        ... except DistributedError as error:
        ...     raise SystemExit("start all processes again; training goes on from its run_dir") from error
        >>> samples.shape
        torch.Size([6, 1, 8, 8])
    """


class TrainingWarning(UserWarning):
    """Something in a run of training is about to go wrong; the message says what and what to change.

    Examples:
        >>> import torch, warnings
        >>> from energy_prior import JointEBMPrior, LadderVAE
        >>> prior = JointEBMPrior(LadderVAE((4,), latent_dims=(3,), hidden=8), space="latent")
        >>> settings = {"iterations": 1, "steps": 1, "persistent": 0, "step_size": 20.0, "progress": False}
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", TrainingWarning)  # a run that is about to go wrong stops
        ...     prior.fit(torch.rand(32, 4), "two_stage", **settings)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        energy_prior.errors.TrainingWarning: Iteration 1 of fit (two_stage): MALA would accept only 0% of the steps of ...
    """


class ChainWarning(UserWarning):
    """A Langevin chain hardly moved; the message says what to change.

    Examples:
        >>> import torch, warnings
        >>> from energy_prior import JointEBMPrior, LadderVAE
        >>> prior = JointEBMPrior(LadderVAE((4,), hidden=8, sigma=1e-3))
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", ChainWarning)
        ...     prior.sample_posterior(torch.rand(2, 4), steps=5, step_size=1.0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        energy_prior.errors.ChainWarning: Metropolis–Hastings accepted 0.0% of the chains' steps, ...
    """


class DataWarning(UserWarning):
    """Data may not be what they should: out of the generator's range, left out, trained on; the message says what was seen.

    Examples:
        >>> import torch, warnings
        >>> from energy_prior import load_example
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     _ = load_example().reconstruct(255 * torch.ones(2, 1, 8, 8))
        >>> print(caught[0].message)
        x: values from 255 to 255, but the generator was made for 0 to 1. Rescale them.
    """


class BackendWarning(UserWarning):
    """A faster backend of the Langevin sampler cannot be used here; the message says why and what is used instead.

    Examples:
        >>> import warnings
        >>> from energy_prior import load_example
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", BackendWarning)  # rather stop than sample more slowly
        ...     load_example().sample(2, backend="graph")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        energy_prior.errors.BackendWarning: backend="graph" cannot run this chain, and "compiled" takes it: it needs ...
    """


class MissingExtraError(EnergyPriorError, ImportError):
    """An optional dependency is not installed; the message names the `pip install` that brings it.

    Examples:
        >>> import sys, torch
        >>> from unittest.mock import patch
        >>> from energy_prior import plots
        >>> with patch.dict(sys.modules, {"matplotlib.figure": None}):  # as where it is not installed
        ...     plots.image_panels("samples.png", {"noise": torch.rand(4, 1, 8, 8)})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        energy_prior.errors.MissingExtraError: matplotlib.figure is not installed; ... pip install "energy-prior[examples]".
    """


class DivergenceError(EnergyPriorError, ArithmeticError):
    """A density, gradient, loss or state stopped being finite.

    Args:
        message: what stopped, and what to do.
        layer: number of the layer at fault (1 is nearest the data); None where it cannot be told apart.
        step: Langevin step or training iteration at which it was first seen (0 is the start); None where it is of none.

    Attributes:
        layer: number of the layer at fault (1 is nearest the data); `None` where it cannot be told apart.
        step: Langevin step or training iteration at which it was first seen (0 is the start).

    Examples:
        >>> from energy_prior import load_example
        >>> prior = load_example()
        >>> _ = prior.energies[1].net[-1].bias.data.fill_(float("nan"))
        >>> try:
        ...     prior.sample(2)
        ... except DivergenceError as error:
        ...     print(f"layer {error.layer}, step {error.step}")
        layer 2, step 0
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
