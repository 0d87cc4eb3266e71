"""`energy-prior evaluate`: how near samples of a prior that `energy-prior train` made are to real images."""

from __future__ import annotations

__all__ = ["add_command", "evaluate_samples"]

import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from energy_prior import plots
from energy_prior.checks.settings import check_count, check_device, check_path
from energy_prior.cli.options import add_run, check_makes_images, numbers_of, stream
from energy_prior.cli.train import read_run
from energy_prior.data import load_images
from energy_prior.errors import ArgumentError
from energy_prior.evaluate import (
    efficientnet_features,
    efficientnet_probabilities,
    frechet_distance,
    gap_closed,
    inception_score,
    kernel_distance,
    precision_recall,
)
from energy_prior.prior import JointEBMPrior

METRICS = ("frechet", "kernel", "precision", "recall", "inception_score")
_SHOWN = 64
_SPREADS = 10  # a gap that is less than so many standard deviations of its ends is none to take shares of
_TITLES = {
    "real": "real images",
    "reconstructions": "reconstructions",
    "generator": "the generator's own prior",
    "joint": "joint prior",
}


def add_command(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "evaluate",
        help="how near samples of a trained prior are to real images",
        description="Compares samples of both priors, reconstructions and real images with other real images, by features of "
        "EfficientNet-Lite0 (extra eval): Fréchet distance (no FID), kernel distance, precision, recall, and inception score "
        "of its classes. Half of the images are compared with, the other half is what is reconstructed; take images that were "
        "not trained on.",
        epilog="example: energy-prior evaluate runs/mnist --data path/to/mnist --number 4000 --out report",
    )
    add_run(parser)
    parser.add_argument("--data", required=True, metavar="SOURCE", help="images, as for `train`")
    parser.add_argument("--split", default="test", help="split of it (default: test)")
    parser.add_argument("--number", help="read only so many images (default: all)")
    parser.add_argument("--draws", default="3", help="sets of samples, for means and spread (default: 3)")
    parser.add_argument("--steps", help="Langevin steps (default: as JointEBMPrior.sample has it)")
    parser.add_argument("--batch-size", default="250", help="images at a time (default: 250)")
    parser.add_argument("--seed", default="0", help="of the draws (default: 0)")
    parser.add_argument("--out", metavar="FOLDER", help="write report.json and samples.png to it")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(command=_run)


def evaluate_samples(
    prior: JointEBMPrior,
    images: Tensor,
    *,
    draws: int = 3,
    batch_size: int = 250,
    seed: int = 0,
    features: Callable[[Tensor], Tensor] = efficientnet_features,
    probabilities: Callable[[Tensor], Tensor] | None = None,
    **chain: Any,
) -> dict[str, Any]:
    """Distances of real images, reconstructions and samples of both priors to other real images.

    A random half of the images is compared with. The other half stands for real images, and is what is reconstructed; samples
    are as many. All are decoded alike and clamped to [0, 1].

    Args:
        prior: a prior of images in [0, 1], (1 or 3, height, width).
        images: images that were not trained on, (n, *x_shape), in [0, 1], n ≥ 8.
        draws: sets of samples of either prior, ≥ 1.
        batch_size: images at a time, ≥ 1.
        seed: of the halves and the draws, ≥ 0.
        features: images, (n, *x_shape) -> (n, d), on the CPU or the images' device.
        probabilities: features, (n, d) -> p(y | x) of some classes, (n, classes), for the inception score; None: those of the
            default features, and no score of others.
        **chain: options of the joint prior's chain.

    Returns:
        "images" (on each side), "draws", and for each of "real", "reconstructions", "generator" and "joint" the metrics
        "frechet", "kernel", "precision", "recall" and "inception_score": {"mean": …, "sd": …}, "sd" None with one draw.
        "frechet" is None where a side has no more images than features: its covariance is singular then, and "kernel" is what
        compares; "inception_score" is None without probabilities.
        "gap_closed": of the Fréchet distance, or of the kernel distance where there is none; None where the gap is below ten
        standard deviations.

    Raises:
        ArgumentError, ShapeError: if a setting is impossible, or the images are others than the prior's.
        MissingExtraError: if the network of the default features is not installed.
    """
    draws, batch_size = check_count("draws", draws), check_count("batch_size", batch_size)
    seed = check_count("seed", seed, least=0)
    check_makes_images(prior)
    if tuple(images.shape[1:]) != tuple(prior.x_shape) or len(images) < 8:
        wanted = ", ".join(map(str, prior.x_shape))
        raise ArgumentError(f"images: expected at least 8, (n, {wanted}), got shape {tuple(images.shape)}.")
    if probabilities is None and features is efficientnet_features:
        probabilities = efficientnet_probabilities
    rng = stream(seed)
    images = images[torch.randperm(len(images), generator=rng)]
    n = len(images) // 2
    reference, others = (_features(part, features, batch_size) for part in (images[:n], images[n : 2 * n]))
    figures = functools.partial(_figures, reference, probabilities)
    found = {"real": [figures(others)]}

    def measured(make: Callable[[int], Tensor]) -> dict[str, float | None]:
        starts = range(0, n, batch_size)
        return figures(torch.cat([_features(make(start), features, batch_size) for start in starts]))

    def reconstructed(start: int) -> Tensor:
        x = images[n + start : n + min(start + batch_size, n)].to(prior.device, prior.dtype)
        return prior.reconstruct(x, rng=rng)

    def sampled(which: Literal["joint", "generator"], start: int) -> Tensor:
        options: dict[str, Any] = chain if which == "joint" else {}
        return prior.sample(min(batch_size, n - start), prior=which, rng=rng, **options)

    bar = tqdm(total=1 + 2 * draws, desc="evaluate", unit="set", disable=None)
    found["reconstructions"] = [measured(reconstructed)]
    bar.update()
    kinds: tuple[Literal["generator", "joint"], ...] = ("generator", "joint")
    for which in kinds:
        found[which] = []
        for _ in range(draws):
            found[which].append(measured(functools.partial(sampled, which)))
            bar.update()
    bar.close()
    report: dict[str, Any] = {"images": n, "draws": draws}
    report |= {kind: {metric: _mean([entry[metric] for entry in sets]) for metric in METRICS} for kind, sets in found.items()}
    report["gap_closed"] = _share(report)
    return report


def _features(images: Tensor, features: Callable[[Tensor], Tensor], batch_size: int) -> Tensor:
    parts = [features(batch.clamp(0, 1)).detach().cpu() for batch in images.split(batch_size)]
    for part in parts:
        if part.ndim != 2 or not part.is_floating_point():
            raise ArgumentError(f"features: expected (n, d) of floating-point numbers, got {tuple(part.shape)}, {part.dtype}.")
    return torch.cat(parts)


def _figures(reference: Tensor, probabilities: Callable[[Tensor], Tensor] | None, other: Tensor) -> dict[str, float | None]:
    precision, recall = precision_recall(reference, other)
    return {
        "frechet": frechet_distance(other, reference) if len(reference) > reference.shape[1] else None,
        "kernel": kernel_distance(other, reference),
        "precision": precision,
        "recall": recall,
        "inception_score": None if probabilities is None else inception_score(probabilities(other)),
    }


def _mean(values: Sequence[float | None]) -> dict[str, float | None] | None:
    there = [v for v in values if v is not None]
    if not there:
        return None
    return {"mean": statistics.fmean(there), "sd": statistics.stdev(there) if len(there) > 1 else None}


def _share(report: dict[str, Any]) -> float | None:
    """What the joint prior closes of the gap between the generator's samples and reconstructions, if there is one."""
    metric = "frechet" if report["joint"]["frechet"] is not None else "kernel"
    joint, generator, reconstructions = (report[kind][metric] for kind in ("joint", "generator", "reconstructions"))
    spread = math.hypot(joint["sd"] or 0.0, generator["sd"] or 0.0)
    if generator["mean"] - reconstructions["mean"] <= _SPREADS * spread:
        return None
    return gap_closed(joint["mean"], generator["mean"], reconstructions["mean"])


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['images']} images a side, {report['draws']} draws; features of EfficientNet-Lite0 (no FID)",
        f"{'':<28}{'Fréchet':>16}{'kernel × 1000':>18}{'precision':>12}{'recall':>10}{'inception score':>17}",
    ]
    for kind, title in _TITLES.items():
        texts = [_text(report[kind][metric], 1000 if metric == "kernel" else 1) for metric in METRICS]
        lines.append(f"{title:<28}{texts[0]:>16}{texts[1]:>18}{texts[2]:>12}{texts[3]:>10}{texts[4]:>17}")
    if report["joint"]["frechet"] is None:
        lines.append("Fréchet distances need more images a side than there are features, 1,280.")
    share = "not known: it is within the spread" if report["gap_closed"] is None else f"{report['gap_closed']:.3f}"
    return "\n".join([*lines, f"gap between the generator's samples and reconstructions that the joint prior closes: {share}"])


def _text(figure: dict[str, Any] | None, scale: float) -> str:
    if figure is None:
        return "–"
    return f"{scale * figure['mean']:.4g}" + ("" if figure["sd"] is None else f" ± {scale * figure['sd']:.2g}")


def _run(options: argparse.Namespace) -> int:
    """The command."""
    check_device("--device", options.device)
    numbers = numbers_of(options, dict.fromkeys(("number", "draws", "steps", "batch_size", "seed"), int))
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
    report = evaluate_samples(prior, images, **numbers)
    if out is not None:
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        seed, shown = numbers["seed"], images[:_SHOWN]
        rngs = [stream(seed) for _ in range(3)]
        panels = {
            "real": shown,
            "reconstructions": prior.reconstruct(shown.to(prior.device, prior.dtype), rng=rngs[0]),
            "Gaussian prior": prior.sample(len(shown), prior="generator", rng=rngs[1]),
            "joint prior": prior.sample(len(shown), rng=rngs[2]),
        }
        plots.image_panels(out / "samples.png", {title: x.clamp(0, 1).cpu() for title, x in panels.items()})
    print(json.dumps(report) if options.json else _table(report))
    return 0
