"""The built-in generators by their names and arguments, for recipes; and files that a generator is built from again."""

from __future__ import annotations

__all__ = [
    "BUILT_IN",
    "GeneratorFile",
    "check_arguments",
    "describe_generator",
    "generator_of",
    "made",
    "read_generator",
    "weights_of",
    "write_generator",
]

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from energy_prior._util import first_line, shortened, shown
from energy_prior.checkpoint import GENERATOR, check_state_fits, load_named, read_checkpoint, write_checkpoint
from energy_prior.checks.settings import check_shape, check_sizes, whole_number
from energy_prior.errors import ArgumentError, CheckpointError, ShapeError
from energy_prior.generators.ladder import LadderVAE
from energy_prior.generators.residual import ResidualVAE

BUILT_IN: dict[str, type[LadderVAE] | type[ResidualVAE]] = {kind.__name__: kind for kind in (LadderVAE, ResidualVAE)}
"""The generators that a checkpoint can describe by name."""

_FEW = 3  # layers of a kind, to see whether such can be built


def describe_generator(generator: object) -> dict[str, Any] | None:
    """What a checkpoint says of a generator, beside the shape of its images: {"kind": its class, argument: value, …}.

    Args:
        generator: any.

    Returns:
        Plain values, which JSON can hold; None if the generator is not one of the library's (a subclass is not).
    """
    if not isinstance(generator, LadderVAE | ResidualVAE) or type(generator) not in BUILT_IN.values():
        return None
    return {"kind": type(generator).__name__, **generator.config}


class GeneratorFile(NamedTuple):
    """What a file of a generator holds.

    Attributes:
        path: of the file.
        weights: its state, by canonical names.
        described: as `describe_generator` has it; or {"factory": "module:function", …} for a generator of the user's own.
        x_shape: of an image.
        reading: how the images were read that it was trained on; None: not known.
    """

    path: Path
    weights: dict[str, Tensor]
    described: dict[str, Any]
    x_shape: tuple[int, ...]
    reading: Any


def write_generator(
    path: Path,
    generator: nn.Module,
    described: Mapping[str, Any],
    x_shape: Sequence[int],
    reading: Mapping[str, Any] | None = None,
) -> None:
    """Writes a generator's weights, with what it is built from.

    Args:
        path: of the file.
        generator: the generator.
        described: see `GeneratorFile`.
        x_shape: of an image.
        reading: see `GeneratorFile`.

    Raises:
        CheckpointError, OSError: as `write_checkpoint`.
    """
    config = {"generator": dict(described), "x_shape": list(x_shape), "reading": None if reading is None else dict(reading)}
    write_checkpoint(path, generator.state_dict(), config, GENERATOR)


def read_generator(path: Path, remedy: str = GENERATOR.remedy) -> GeneratorFile:
    """What `write_generator` wrote; nothing is built yet.

    Args:
        path: of the file.
        remedy: what to do where it cannot be read, for errors.

    Raises:
        FileNotFoundError, CheckpointError: as `read_checkpoint`; or if something is missing, or is not what it is called.
    """
    weights, config = read_checkpoint(path, GENERATOR, remedy)
    described, x_shape = config.get("generator"), config.get("x_shape")
    try:
        shape = check_shape("x_shape", x_shape)
    except ShapeError:
        shape = None
    if not isinstance(described, dict) or not isinstance(x_shape, list) or shape is None:
        raise _damaged(path, "what it says of its generator and images is incomplete or impossible", remedy)
    return GeneratorFile(path, weights, described, tuple(shape), config.get("reading"))


def generator_of(file: GeneratorFile, remedy: str = GENERATOR.remedy) -> LadderVAE | ResidualVAE:
    """A generator of the library as it was written, on the CPU, in the dtype of its weights; no random number is drawn.

    What a description asks for is compared with the weights that there are before anything of its size is made.

    Args:
        file: of `read_generator`.
        remedy: what to do where it cannot be built, for errors.

    Raises:
        CheckpointError: if there is no such generator, or it has other weights.
    """
    settings, path, weights = dict(file.described), file.path, file.weights
    kind = settings.pop("kind", None)
    if not isinstance(kind, str) or kind not in BUILT_IN:
        what = shown(file.described)
        raise _damaged(path, f"it describes a generator that this version does not have, {what}", remedy)
    if _modules(kind, settings) > len(weights) + _FEW:
        raise _damaged(path, "it asks for more layers than it has weights", remedy)
    try:
        expected = weights_of(kind, file.x_shape, settings)
    except ArgumentError as error:
        raise _damaged(path, str(error).rstrip("."), remedy) from error
    if expected != {name: value.shape for name, value in weights.items()}:
        raise _damaged(path, "the generator that it describes has other weights", remedy)
    dtypes = [value.dtype for value in weights.values() if value.is_floating_point()]
    with torch.random.fork_rng(devices=[]):
        generator = made(kind, file.x_shape, settings).to(dtypes[0])
    check_state_fits(path, generator.state_dict(), weights, "the generator that it describes", remedy)
    load_named(generator, weights)
    return generator


def _damaged(path: Path, reason: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{os.fspath(path)!r} is damaged: {reason}. {remedy}")


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
