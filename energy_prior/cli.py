"""The command line: `energy-prior demo`."""

from __future__ import annotations

__all__ = ["main"]

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from energy_prior import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status (0, or 2 after an error that the message explains)."""
    options = _parser().parse_args(arguments)
    from energy_prior.errors import EnergyPriorError

    try:
        return _demo(options)
    except (EnergyPriorError, OSError) as error:
        print(f"energy-prior: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="energy-prior", description="Joint latent-space energy-based priors.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train and compare on real 8x8 digits, in a minute, with no download",
        description="Trains a two-layer VAE and its joint prior on scikit-learn's bundled digits with one digit held out, and "
        "writes samples.png, langevin.png, scores.png and report.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--unknown", type=int, default=9, metavar="DIGIT", help="the digit held out of training")
    demo.add_argument("--seed", type=int, default=0, help="of the split, the training and the samples")
    demo.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, …")
    demo.add_argument("--out", type=Path, default=Path("energy-prior-demo"), help="folder to write to")
    demo.add_argument("--quick", action="store_true", help="a few iterations, to see that it runs; the figures mean nothing")
    return parser


def _demo(options: argparse.Namespace) -> int:
    import torch

    from energy_prior.demo import DemoSettings, run_demo
    from energy_prior.errors import ArgumentError

    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {options.device}: not available here ({str(error).splitlines()[0]}).") from error
    torch.set_num_threads(1)  # the nets are tiny: more threads gain nothing, and stall where other programs run
    settings = DemoSettings(unknown=options.unknown, seed=options.seed, device=options.device)
    report = run_demo(settings.quick() if options.quick else settings, options.out)
    print(_table(report, options.out))
    if options.quick:
        print("--quick: these figures only show that everything runs.")
    return 0


def _table(report: dict[str, Any], out: Path) -> str:
    samples, latents, scores = report["samples"], report["latents"], report["scores"]
    unknown = report["unknown_digit"]
    rows = [
        ("", "Gaussian prior", "joint prior", "ideal"),
        (
            "Fréchet distance of samples to test digits",
            f"{samples['frechet_generator']:.2f}",
            f"{samples['frechet_joint']:.2f}",
            f"{samples['frechet_floor']:.2f}",
        ),
        (
            "accuracy of telling latents from the posterior's",
            f"{latents['c2st_generator']:.3f}",
            f"{latents['c2st_joint']:.3f}",
            "0.500",
        ),
    ]
    lines = [f"{a:<50}{b:>16}{c:>14}{d:>8}" for a, b, c, d in rows]
    lines += ["", f"{f'unknown digit {unknown} against known ones':<50}{'AUROC':>16}{'AUPRC':>14}"]
    lines += [f"  score {name!r:<42}{s['auroc']:>16.3f}{s['auprc']:>14.3f}" for name, s in scores.items()]
    lines += [
        "",
        f"Excess of the Fréchet distance over its floor: {samples['frechet_excess_ratio']:.2f} of the Gaussian prior's.",
        f"{report['seconds']['all']:.0f} s. Pictures and report.json are in {out}/",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
