"""The command line: `energy-prior demo`, `train`, `score` and `info`."""

from __future__ import annotations

__all__ = ["main"]

import argparse
import sys
from collections.abc import Sequence

from energy_prior import __version__
from energy_prior.cli import demo, info, score, train
from energy_prior.errors import EnergyPriorError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, what the command says, or 2 after an error, which is one line.

    Args:
        arguments: words of the command line, without the program's name; None: those of this process.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (EnergyPriorError, OSError) as error:
        print(f"energy-prior: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="energy-prior", description="Joint latent-space energy-based priors.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo.add_command(commands)
    train.add_command(commands)
    score.add_command(commands)
    info.add_command(commands)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
