"""`energy-prior sample`: images of a prior that `energy-prior train` made, as files."""

from __future__ import annotations

__all__ = ["add_command", "write_samples"]

import argparse
import json
import os
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from energy_prior import plots
from energy_prior._util import eight_bit
from energy_prior.checkpoint import digest, fingerprint
from energy_prior.checks.settings import check_count, check_device, check_path, require_extra
from energy_prior.cli.options import add_run, check_makes_images, numbers_of, stream
from energy_prior.cli.train import load_run
from energy_prior.errors import ArgumentError
from energy_prior.prior import JointEBMPrior

_GRID = 64
_NOTE = "samples.json"


def add_command(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "sample",
        help="images of a trained prior, as PNG files",
        description="Draws images and writes them as PNG files, 000000.png and on, which tools for FID and the like read. The "
        "same command after a kill goes on where it was, and ends with the same images.",
        epilog="example: energy-prior sample runs/mnist -n 1000 --out samples --grid samples.png",
    )
    add_run(parser)
    parser.add_argument("-n", "--number", default="64", help="images (default: 64)")
    parser.add_argument("--out", default="samples", help="folder to write to (default: samples)")
    parser.add_argument("--grid", metavar="FILE", help="picture of the first 64 beside those of the generator's own prior")
    parser.add_argument(
        "--prior", choices=("joint", "generator"), default="joint", help="the generator's own prior, to compare with"
    )
    parser.add_argument("--steps", help="Langevin steps (default: as JointEBMPrior.sample has it)")
    parser.add_argument("--batch-size", default="100", help="images at a time (default: 100)")
    parser.add_argument("--seed", default="0", help="of the draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(command=_run, resumes=True)


def write_samples(
    prior: JointEBMPrior,
    n: int,
    out: str | os.PathLike[str],
    *,
    which: Literal["joint", "generator"] = "joint",
    batch_size: int = 100,
    seed: int = 0,
    **chain: Any,
) -> dict[str, Any]:
    """Draws images and writes them as 8-bit PNG files; after a kill it goes on where it was, with the same images.

    Each batch has a random stream of its own, made of the seed and its place. Values outside [0, 1] are clamped.

    Args:
        prior: a prior of images in [0, 1], (1 or 3, height, width).
        n: number of images, ≥ 1; a larger one than before adds to them.
        out: the folder, made if it is not there; `samples.json` in it says what the images are of.
        which: the joint prior, or the generator's own.
        batch_size: images at a time, ≥ 1.
        seed: of the draws, ≥ 0.
        **chain: options of the chain, as in `JointEBMPrior.sample`.

    Returns:
        "images", "drawn" (those that were not there yet), "prior" and "out".

    Raises:
        ArgumentError: if a setting is impossible, the prior is not one of images, or the folder holds images of another prior
            or other settings.
        OSError: if a file cannot be written; those before it stay.
    """
    n, batch_size = check_count("n", n), check_count("batch_size", batch_size)
    seed, folder = check_count("seed", seed, least=0), check_path("out", out)
    image: Any = require_extra("PIL.Image", "examples")
    check_makes_images(prior)
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"out: expected a folder to write to, but {os.fspath(out)!r} is a file.")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"prior": which, "seed": seed, "batch_size": batch_size, **chain}
    known = {**settings, "model": digest(dict(prior.state_dict()), fingerprint(prior.generator))}
    _claim(folder, known)
    drawn = 0
    for first in tqdm(range(0, n, batch_size), desc="sample", unit="batch", disable=None):
        files = [folder / f"{i:06d}.png" for i in range(first, min(first + batch_size, n))]
        if all(file.exists() for file in files):
            continue
        rng = stream(seed, first)
        x = prior.sample(batch_size, prior=which, rng=rng, **chain)
        for file, pixels in zip(files, eight_bit(x), strict=False):
            temporary = file.with_suffix(".tmp")
            try:
                image.fromarray(pixels.numpy()).save(temporary, "png")
                temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)
        drawn += len(files)
    return {"images": n, "drawn": drawn, "prior": which, "out": os.fspath(out)}


def _claim(folder: Path, known: dict[str, Any]) -> None:
    """Says in the folder what its images are of, and refuses one that holds others."""
    note = folder / _NOTE
    if not note.exists():
        if next(folder.glob("*.png"), None) is not None:
            raise ArgumentError(f"out: {os.fspath(folder)!r} holds images that are none of this command's. Use another folder.")
        note.write_text(json.dumps(known) + "\n")
        return
    try:
        before = json.loads(note.read_text())
    except ValueError:
        before = None
    if before != known:
        raise ArgumentError(
            f"out: {os.fspath(folder)!r} holds images of another prior or other settings ({_NOTE} says which). Use another "
            "folder, or empty this one."
        )


def _run(options: argparse.Namespace) -> int:
    """The command."""
    check_device("--device", options.device)
    numbers = numbers_of(options, dict.fromkeys(("number", "batch_size", "seed", "steps"), int))
    prior = load_run(options.run, options.factory).to(options.device)
    n = numbers.pop("number")
    report = write_samples(prior, n, options.out, which=options.prior, **numbers)
    if options.grid is not None:
        rngs = [stream(numbers["seed"]) for _ in range(2)]
        panels = {
            "samples, Gaussian prior": prior.sample(_GRID, prior="generator", rng=rngs[0]),
            "samples, joint prior": prior.sample(_GRID, rng=rngs[1]),
        }
        plots.image_panels(check_path("--grid", options.grid), panels)
        report["grid"] = options.grid
    if options.json:
        print(json.dumps(report))
    else:
        there = report["images"] - report["drawn"]
        before = f", {there} of them from before" if there else ""
        print(f"{report['images']} images of the {options.prior} prior are in {report['out']}{os.sep}{before}")
    return 0
