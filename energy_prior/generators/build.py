"""The built-in generators by their names and arguments: how recipes and checkpoints describe one, and how it is built."""

from __future__ import annotations

__all__ = ["BUILT_IN", "build_generator", "check_arguments", "describe_generator", "made", "weights_of"]

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from energy_prior._util import first_line, shortened, shown
from energy_prior.checkpoint import GENERATOR, check_state_fits, load_named
from energy_prior.checks.settings import check_sizes, whole_number
from energy_prior.errors import ArgumentError, CheckpointError, ShapeError
from energy_prior.generators.ladder import LadderVAE
from energy_prior.generators.residual import ResidualVAE

BUILT_IN: dict[str, type[LadderVAE] | type[ResidualVAE]] = {kind.__name__: kind for kind in (LadderVAE, ResidualVAE)}
"""The generators that a checkpoint can describe by name."""

_FEW = 3  # layers of a kind, to see whether such can be built


def describe_generator(generator: object) -> dict[str, Any] | None:
    """What a checkpoint says of a generator, enough to build it again: {"kind": its class, "x_shape": […], argument: value, …}.

    Args:
        generator: any.

    Returns:
        Plain values, which JSON can hold; None if the generator is not one of the library's (a subclass is not).
    """
    if not isinstance(generator, LadderVAE | ResidualVAE) or type(generator) not in BUILT_IN.values():
        return None
    return {"kind": type(generator).__name__, "x_shape": list(generator.x_shape), **generator.config}


def build_generator(
    path: str | os.PathLike[str], described: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> LadderVAE | ResidualVAE:
    """The generator that `describe_generator` described, with these weights, on the CPU.

    What a description asks for is compared with the weights that there are before anything of its size is made.

    Args:
        path: of the checkpoint, for errors.
        described: as `describe_generator` returned it.
        weights: its state, by canonical names.

    Raises:
        CheckpointError: if there is no such generator, or it has other weights.
    """
    settings = dict(described)
    kind, x_shape = settings.pop("kind", None), settings.pop("x_shape", None)
    if not isinstance(kind, str) or kind not in BUILT_IN or not isinstance(x_shape, list):
        raise _damaged(path, f"it describes a generator that this version does not have, {shown(dict(described))}")
    if _modules(kind, settings) > len(weights) + _FEW:
        raise _damaged(path, "it asks for more layers than it has weights")
    try:
        expected = weights_of(kind, x_shape, settings)
    except ArgumentError as error:
        raise _damaged(path, str(error).rstrip(".")) from error
    if expected != {name: value.shape for name, value in weights.items()}:
        raise _damaged(path, "the generator that it describes has other weights")
    generator = made(kind, x_shape, settings)
    check_state_fits(path, generator.state_dict(), weights, "the generator that it describes", GENERATOR.remedy)
    load_named(generator, weights)
    return generator


def _damaged(path: str | os.PathLike[str], reason: str) -> CheckpointError:
    return CheckpointError(f"{os.fspath(path)!r} is damaged: {reason}. {GENERATOR.remedy}")


def made(kind: str, x_shape: Sequence[int], settings: Mapping[str, Any]) -> LadderVAE | ResidualVAE:
    """A built-in generator of random weights.

    Args:
        kind: its class.
        x_shape: shape of an image, (channels, height, width).
        settings: the other arguments.

    Raises:
        ArgumentError: if there is no such class or argument, or a value is impossible; the message names "generator.argument".
    """
    if kind not in BUILT_IN:
        raise ArgumentError(f"generator.kind: expected one of {', '.join(BUILT_IN)}, got {shown(kind)}.")
    known = _arguments(kind)
    for name in settings:
        if name not in known:
            raise ArgumentError(f"generator.{shortened(name)}: not an argument of {kind}. There are {', '.join(known)}.")
    try:
        return BUILT_IN[kind](x_shape, **settings)
    except (ArgumentError, ShapeError) as error:
        raise ArgumentError(f"generator.{error}") from error
    except (TypeError, ArithmeticError, RuntimeError) as error:  # other types, or sizes beyond what memory can have
        raise ArgumentError(f"generator: {kind} cannot be built from {shown(dict(settings))}: {first_line(error)}.") from error


def weights_of(kind: str, x_shape: Sequence[int], settings: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Shapes of the weights of such a generator by name, without making any; no random number is drawn.

    Args:
        kind: its class.
        x_shape: shape of an image.
        settings: the other arguments.

    Raises:
        ArgumentError: as `made`.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return {name: value.shape for name, value in made(kind, x_shape, settings).state_dict().items()}


def check_arguments(kind: str, settings: Mapping[str, Any]) -> None:
    """A generator of this kind takes these arguments, for images of some size. Of many layers, the first few stand for all.

    Args:
        kind: its class.
        settings: its arguments beside the shape of an image.

    Raises:
        ArgumentError: as `made`.
    """
    few = dict(settings)
    for name in ("latent_dims", "groups"):
        if isinstance(settings.get(name), list):
            try:
                sizes = check_sizes(name, settings[name])[:_FEW]
            except ArgumentError as error:
                raise ArgumentError(f"generator.{error}") from error
            few[name] = [min(size, _FEW) for size in sizes] if name == "groups" else list(sizes)
    for name in ("depth", "cells", "tower_cells", "downsample"):
        if (whole_number(settings.get(name)) or 0) > _FEW:
            few[name] = _FEW
    side = 2 ** (2 * _FEW)
    weights_of(kind, (1, side, side), few)


def _arguments(kind: str) -> dict[str, Any]:
    """Its arguments beside the shape of an image, and their defaults."""
    return {name: p.default for name, p in inspect.signature(BUILT_IN[kind]).parameters.items() if name != "x_shape"}


def _modules(kind: str, settings: Mapping[str, Any]) -> int:
    """A count of modules that it does not have fewer of, without making any; each has weights."""
    given = _arguments(kind) | dict(settings)
    numbers = {name: whole_number(value) or 0 for name, value in given.items()}
    if kind == LadderVAE.__name__:
        return numbers["depth"] * len(given["latent_dims"] if isinstance(given["latent_dims"], Sequence) else ())
    groups = given["groups"] if isinstance(given["groups"], Sequence) else ()
    layers = sum(whole_number(count) or 0 for count in groups)
    return max(layers, numbers["downsample"], numbers["cells"] * layers + numbers["tower_cells"] * (numbers["downsample"] + 1))
