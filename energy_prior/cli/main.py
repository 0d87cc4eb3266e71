"""The command line: `energy-prior demo` and `energy-prior train`."""

from __future__ import annotations

__all__ = ["launched_accelerator", "main"]

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from energy_prior import __version__
from energy_prior.training import launched_accelerator


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status (0, or 2 after an error that the message explains)."""
    options = _parser().parse_args(arguments)
    from energy_prior.errors import EnergyPriorError

    try:
        return {"demo": _demo, "train": _train}[options.command](options)
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
    train = commands.add_parser(
        "train",
        help="train a generator and its joint prior on images, from a YAML file or flags",
        description="Trains a generator by its ELBO, then its joint prior, and writes both, samples and a report. The same "
        "command after a kill goes on where it was. `accelerate launch -m energy_prior.cli train …` runs it on several "
        "processes, hosts or GPUs.",
    )
    train.add_argument("config", nargs="?", type=Path, help="the recipe, a YAML file; --settings lists what it can hold")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="e.g. elbo.iterations=500 or fit.0.method=joint; repeatable",
    )
    train.add_argument("--data", metavar="SOURCE", help="the same as --set data.source=…")
    train.add_argument("--out", metavar="FOLDER", help="the same as --set out=…")
    train.add_argument("--seed", metavar="NUMBER", help="the same as --set seed=…")
    train.add_argument("--device", metavar="DEVICE", help="the same as --set device=…")
    train.add_argument("--settings", action="store_true", help="print every setting with its default and meaning, and stop")
    return parser


def _train(options: argparse.Namespace) -> int:
    from energy_prior.cli.train import read_recipe, run_recipe, settings_help

    if options.settings:
        print(settings_help())
        return 0
    texts = {"data.source": options.data, "out": options.out, "device": options.device}
    seed = [] if options.seed is None else [f"seed={options.seed}"]
    recipe = read_recipe(options.config, [*options.set, *seed], {k: v for k, v in texts.items() if v is not None})
    with launched_accelerator(cpu=recipe.device == "cpu") as accelerator:
        report = run_recipe(recipe, accelerator)
    for name, entry in report.items():
        print(f"{name}: {entry}")
    print(f"prior.safetensors, generator.safetensors, samples.png and report.json are in {recipe.out}/")
    return 0


def _demo(options: argparse.Namespace) -> int:
    import torch

    from energy_prior.checks.arguments import check_device
    from energy_prior.cli.demo import DemoSettings, run_demo

    check_device("--device", options.device)
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
