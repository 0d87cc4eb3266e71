"""What the commands' options have in common."""

from __future__ import annotations

__all__ = ["add_run", "check_makes_images", "numbers_of", "stream"]

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from energy_prior.errors import ArgumentError

if TYPE_CHECKING:
    from energy_prior.prior import JointEBMPrior


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds what names the run of `energy-prior train` whose prior is used: `run`, `factory` and `device`."""
    parser.add_argument("run", help="folder of a run of `energy-prior train`")
    parser.add_argument(
        "--factory",
        metavar="MODULE:FUNCTION",
        help="where the run's recipe named one: the function that gives the generator, which is imported and called",
    )
    parser.add_argument("--device", default="cpu", help="where it computes (default: cpu)")


def numbers_of(options: argparse.Namespace, kinds: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Options that are numbers, read from their texts; those that were not given are left out.

    Args:
        options: of the command line.
        kinds: name -> `int` or `float`.

    Raises:
        ArgumentError: if a text is no such number.
    """
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        text = getattr(options, name)
        if text is None:
            continue
        try:
            found[name] = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ArgumentError(f"--{name.replace('_', '-')}: expected {what}, got {text!r}.") from None
    return found


def check_makes_images(prior: JointEBMPrior) -> None:
    """Raises `ArgumentError` if a prior is not one of images."""
    if len(prior.x_shape) != 3 or prior.x_shape[0] not in (1, 3):
        raise ArgumentError(f"prior: expected one of images, (1 or 3, height, width), got {tuple(prior.x_shape)}.")


def stream(seed: int, batch: int | None = None) -> torch.Generator:
    """The random stream of a seed, or of the batch that begins at image `batch` under this seed: whichever run draws it."""
    return torch.Generator().manual_seed((seed if batch is None else seed * 1_000_003 + batch) % 2**63)
