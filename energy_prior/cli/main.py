"""The command line: `energy-prior demo`, `train`, `sample`, `view`, `score`, `evaluate`, `check` and `info`."""

from __future__ import annotations

__all__ = ["INTERRUPTED", "main"]

import argparse
import sys
from collections.abc import Sequence

from energy_prior import __version__
from energy_prior.cli import check, demo, evaluate, info, sample, score, train, view
from energy_prior.errors import EnergyPriorError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, what the command says, 2 after an error, which is one line, 130 after Ctrl-C.

    Args:
        arguments: words of the command line, without the program's name; None: those of this process.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (EnergyPriorError, OSError) as error:
        print(f"energy-prior: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; what is done is kept, and the same command goes on from there" if hasattr(options, "resumes") else ""
        print(f"energy-prior: stopped{kept}", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="energy-prior", description="Joint latent-space energy-based priors.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (demo, train, sample, view, score, evaluate, check, info):
        command.add_command(commands)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
