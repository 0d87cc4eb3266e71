"""`energy-prior evaluate`: how near samples of a prior that `energy-prior train` made are to real images."""

from __future__ import annotations

__all__ = ["add_command"]

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from energy_prior import plots
from energy_prior.checks.settings import check_device, check_path
from energy_prior.cli.options import add_run, check_makes_images, numbers_of, stream
from energy_prior.cli.train import read_run
from energy_prior.data import load_images
from energy_prior.errors import ArgumentError
from energy_prior.evaluate import SampleTask, inception_features, inception_probabilities

_SHOWN = 64


def add_command(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "evaluate",
        help="how near samples of a trained prior are to real images",
        description="Compares samples of both priors, reconstructions and real images with other real images: Fréchet and "
        "kernel distance, precision, recall, and inception score. Features and classes are those of EfficientNet-Lite0 (extra "
        "eval), or of Inception (extra fid): FID and KID. Half of the images are compared with, the other half is what is "
        "reconstructed; take images that were not trained on.",
        epilog="example: energy-prior evaluate runs/mnist --data path/to/mnist --number 4000 --out report",
    )
    add_run(parser)
    parser.add_argument("--data", required=True, metavar="SOURCE", help="images, as for `train`")
    parser.add_argument("--split", default="test", help="split of it (default: test)")
    parser.add_argument("--number", help="read only so many images (default: all)")
    parser.add_argument("--draws", default="3", help="sets of samples, for means and spread (default: 3)")
    parser.add_argument("--steps", help="Langevin steps (default: as JointEBMPrior.sample has it)")
    parser.add_argument(
        "--features", default="efficientnet", choices=("efficientnet", "inception"), help="(default: efficientnet)"
    )
    parser.add_argument("--weights", metavar="FILE", help="of Inception (default: where torch keeps downloads)")
    parser.add_argument("--batch-size", default="250", help="images at a time (default: 250)")
    parser.add_argument("--seed", default="0", help="of the draws (default: 0)")
    parser.add_argument("--out", metavar="FOLDER", help="write report.json and samples.png to it")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    """The command."""
    check_device("--device", options.device)
    numbers = numbers_of(options, dict.fromkeys(("number", "draws", "steps", "batch_size", "seed"), int))
    network: dict[str, Any] = {}
    if options.features == "inception":
        network = {"features": functools.partial(inception_features, weights=options.weights), "network": "Inception"}
        network["probabilities"] = functools.partial(inception_probabilities, weights=options.weights)
    elif options.weights is not None:
        raise ArgumentError("--weights: they are Inception's; give --features inception too.")
    prior, reading = read_run(options.run, options.factory)
    prior = prior.to(options.device)
    check_makes_images(prior)
    channels, height, width = prior.x_shape
    limit = numbers.pop("number", None)
    images = load_images(
        options.data,
        options.split,
        size=height if height == width else None,
        channels=channels,
        limit=limit,
        label_column=False,
        **reading,
    ).images
    out: Path | None = None
    if options.out is not None:
        out = check_path("--out", options.out)
        out.mkdir(parents=True, exist_ok=True)
    seed, rng = numbers["seed"], stream(numbers["seed"])
    chain = {"steps": numbers["steps"]} if "steps" in numbers else {}
    task = SampleTask.halves(images, seed=seed, batch_size=numbers["batch_size"], device=prior.device, **network)
    priors: dict[str, Callable[[int], Tensor]] = {
        "generator's own prior": lambda n: prior.sample(n, prior="generator", rng=rng),
        "joint prior": lambda n: prior.sample(n, rng=rng, **chain),
    }
    report = task.report(priors, lambda x: prior.reconstruct(x.to(prior.dtype), rng=rng), draws=numbers["draws"])
    if out is not None:
        (out / "report.json").write_text(json.dumps(report.document(), indent=1) + "\n")
        shown = images[:_SHOWN]
        rngs = [stream(seed) for _ in range(3)]
        panels = {
            "real": shown,
            "reconstructions": prior.reconstruct(shown.to(prior.device, prior.dtype), rng=rngs[0]),
            "Gaussian prior": prior.sample(len(shown), prior="generator", rng=rngs[1]),
            "joint prior": prior.sample(len(shown), rng=rngs[2], **chain),
        }
        plots.image_panels(out / "samples.png", {title: x.clamp(0, 1).cpu() for title, x in panels.items()})
    print(json.dumps(report.document()) if options.json else report)
    return 0
