"""What the commands' options have in common."""

from __future__ import annotations

__all__ = ["add_run", "numbers_of"]

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from energy_prior.errors import ArgumentError


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
