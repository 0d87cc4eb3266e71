"""`energy-prior check`: `check_generator` on a generator that a function of yours makes."""

from __future__ import annotations

__all__ = ["FAULTS", "add_command"]

import argparse
import json
from typing import Any

import torch
from torch import Tensor, nn

from energy_prior.checks.generator import check_generator, probe_generator
from energy_prior.checks.settings import check_count, check_device
from energy_prior.cli.options import numbers_of
from energy_prior.cli.recipe import imported
from energy_prior.data import load_images
from energy_prior.errors import ArgumentError, GeneratorError

FAULTS = 1
"""Exit status where the generator breaks the protocol."""


def add_command(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "check",
        help="test a generator of yours against the protocol",
        description="Calls a function of yours, which gives a generator, runs check_generator on a few images, and prints what "
        "is right, or every fault with its remedy. Exit status: 0; 1 if the generator has faults; 2 after an error.",
        epilog="example: energy-prior check my_model:make --data photos, for `def make(): return Adapter(…)` in my_model.py",
    )
    parser.add_argument(
        "factory", metavar="MODULE:FUNCTION", help="of the current folder, or installed; called without arguments"
    )
    parser.add_argument("--data", metavar="SOURCE", help="images as for `train`; without it, noise in [0, 1]")
    parser.add_argument("--split", default="train", help="split of it (default: train)")
    parser.add_argument("--number", default="4", help="images (default: 4)")
    parser.add_argument("--device", default="cpu", help="where it computes (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(command=_run)


def _observations(options: argparse.Namespace, generator: Any, n: int) -> Tensor:
    """Images of the source, or noise, in the range that the generator says it has."""
    probe = probe_generator(generator)
    low, high = getattr(generator, "x_range", None) or (0.0, 1.0)
    if options.data is None:
        x = torch.rand(n, *probe.x_shape, generator=torch.Generator().manual_seed(0))
    else:
        if len(probe.x_shape) != 3 or probe.x_shape[0] not in (1, 3):
            raise ArgumentError(f"--data: the generator makes no images, but observations of shape {tuple(probe.x_shape)}.")
        channels, height, width = probe.x_shape
        size = height if height == width else None
        x = load_images(options.data, options.split, size=size, channels=channels, limit=n, label_column=False).images
    return (low + (high - low) * x).to(probe.latents[0])


def _run(options: argparse.Namespace) -> int:
    """The command."""
    check_device("--device", options.device)
    n = check_count("--number", numbers_of(options, {"number": int})["number"], least=2)
    make = imported("factory", options.factory)
    try:
        generator = make()
    except Exception as error:  # whatever the user's function raises
        raise ArgumentError(f"factory: {options.factory!r} raised {type(error).__name__}: {error}") from error
    there: Any = generator.to(options.device) if isinstance(generator, nn.Module) else generator
    try:
        passed = check_generator(there, _observations(options, there, n))
    except GeneratorError as error:
        print(json.dumps({"right": [], "faults": str(error)}) if options.json else error)
        return FAULTS
    if options.json:
        print(json.dumps({"right": list(passed), "faults": None}))
    else:
        print(f"{type(generator).__name__}: no faults found in {n} observations.", *(f"- {line}" for line in passed), sep="\n")
    return 0
