"""`energy-prior view`: a page to look at a prior that `energy-prior train` made."""

from __future__ import annotations

__all__ = ["add_command", "write_page"]

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from energy_prior.checkpoint import write_whole
from energy_prior.checks.arguments import check_observations
from energy_prior.checks.settings import check_count, check_device, check_path, require_extra
from energy_prior.cli.options import add_run, check_makes_images, numbers_of, stream
from energy_prior.cli.score import UNREADABLE, score_rows
from energy_prior.cli.train import read_run
from energy_prior.data import Images, load_images
from energy_prior.errors import ArgumentError, DivergenceError
from energy_prior.evaluate import detection
from energy_prior.langevin import ChainSettings
from energy_prior.page.chains import ChainView, HeldRow, HeldView, chain_views, held_views, sample_views
from energy_prior.page.document import page
from energy_prior.page.histograms import ScoredSet, score_views
from energy_prior.page.parts import lowered, thumbnail_size
from energy_prior.page.parts import number as in_short
from energy_prior.prior import JointEBMPrior
from energy_prior.protocol import find_infer, have_waymarks

_MOST_SAMPLES = 256
_MOST_VALUES = 2**21  # of the images but for those behind bars; a byte each, a third more as text
_CHAINS, _FRAMES, _MOST_POINTS = 3, 7, 200
_HELD, _DRAWS, _MOST_ROWS = 4, 4, 12
_QUANTILE = 0.95
_SAME_START = "eager"  # the backend whose chains begin at the generator's own draw of the same seed
_BATCH = 256


def add_command(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "view",
        help="a page to look at a trained prior",
        description="Writes one HTML file, for any browser, that needs no server, no network and no other file: samples of "
        "both priors side by side, chains with their energies, images with layers held and redrawn, and, with --data, the "
        "scores of images, with the images behind each bar. Exit status: 0; 2 after an error; 3 if images could not be read or "
        "scored.",
        epilog="example: energy-prior view runs/mnist --data path/to/mnist --other photos --out view.html, for images in "
        "photos/test/",
    )
    add_run(parser)
    parser.add_argument("--data", metavar="SOURCE", help="known images, not trained on, as for `score`")
    parser.add_argument("--split", default="test", help="split of it (default: test)")
    parser.add_argument("--other", metavar="SOURCE", help="other images, to compare scores with")
    parser.add_argument("--other-split", help="split of them (default: as --split)")
    parser.add_argument("--limit", default="1000", help="read only so many images of each (default: 1000)")
    parser.add_argument("--out", default="view.html", help="file to write (default: view.html)")
    parser.add_argument(
        "-n",
        "--number",
        default="24",
        help=f"samples of each prior, at most {_MOST_SAMPLES} (default: 24); the file has at most 5 MB",
    )
    parser.add_argument("--steps", help="Langevin steps (default: as JointEBMPrior.sample has it)")
    parser.add_argument("--method", help="score, as in JointEBMPrior.anomaly_score (default: tails)")
    parser.add_argument("--seed", default="0", help="of the draws (default: 0)")
    parser.add_argument(
        "--as-found",
        action="store_true",
        help="find out what pixels mean, instead of reading them as the run's images were read",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(command=_run)


def write_page(
    prior: JointEBMPrior,
    out: str | os.PathLike[str],
    *,
    data: Tensor | Images | None = None,
    other: Tensor | Images | None = None,
    labels: tuple[str, str] = ("known", "other"),
    title: str = "A joint prior",
    number: int = 24,
    method: str | None = None,
    seed: int = 0,
    **chain: Any,
) -> dict[str, Any]:
    """Writes a page about a prior: one HTML file that needs no other and no network. The same call writes the same file.

    On it are samples of both priors from the same noise; three chains as film strips, with Σ_i f_i(z_i) of their steps; four
    images, or without `data` samples, with the layers above k held and the k nearest the data redrawn from the joint prior,
    for k = 0 … L (of more than 12 layers for some k); and histograms of anomaly scores with images behind each bar. Values
    outside [0, 1] are clamped. Images are PNGs inside the page, scaled down where the file would pass 5 MB.

    Args:
        prior: a prior of images in [0, 1], (1 or 3, height, width).
        out: the file, .html or .htm; written whole or not at all.
        data: known images that were not trained on, (n, *x_shape), in [0, 1]: a tensor, or what `load_images` gives, with
            names; None: no scores are shown, and samples stand for images.
        other: other images, to compare scores with.
        labels: what the two sets are called.
        title: of the page.
        number: samples of each prior, 1 … 256.
        method: the score, as for `JointEBMPrior.anomaly_score`.
        seed: of the draws, ≥ 0: the samples are those of `prior.sample(number, rng=torch.Generator().manual_seed(seed))`.
        **chain: options of the chains, as in `JointEBMPrior.sample`; `steps` ≥ 1, and `backend` is "eager" unless given: its
            chains begin at the generator's own draws of the same seed.

    Returns:
        "out", "bytes", "number", "images" and "other" (images with a score; None without the set), "unreadable" (of both,
        those without), "method", "threshold" (95% of the known images of `calibrate` stay below it; None but for "tails") and
        "auroc" (None without `other`).

    Raises:
        ArgumentError, ShapeError: if a setting is impossible, the prior is not one of images, or images do not fit it.
        DivergenceError: if a chain diverges, or no image has a finite score.
        MissingExtraError: if a package of the extra "examples" is not installed.
        OSError: if the file cannot be written.
    """
    target, seed = check_path("out", out), check_count("seed", seed, least=0)
    number = check_count("number", number)
    options: Any = {"backend": _SAME_START, **chain}
    settings = ChainSettings.of(options)
    check_count("steps", settings.steps)
    require_extra("PIL.Image", "examples")
    _check(prior, target, number)
    if other is not None and data is None:
        raise ArgumentError("other: expected known images, `data`, to compare with. Pass them too.")
    if method is not None and data is None:
        raise ArgumentError("method: expected known images, `data`, to score. Pass them too.")
    if len(labels) != 2:
        raise ArgumentError(f"labels: expected the names of both sets, got {labels!r}.")
    sets = [_named(prior, name, x) for name, x in (("data", data), ("other", other)) if x is not None]
    bar = tqdm(total=4 if sets else 3, desc="view", unit="part", disable=None)
    layers = len(prior.energies)
    sections: dict[str, tuple[str, list[str], str]] = {}
    report: dict[str, Any] = {"number": number, "images": None, "other": None, "unreadable": 0}
    report |= {"method": None, "threshold": None, "auroc": None}
    scored: list[ScoredSet] = []
    if sets:
        report["method"] = method or ("tails" if prior.calibration.is_set else "log_joint")
        scored = [_scored(prior, label, x, report["method"], seed) for label, x in zip(labels, sets, strict=False)]
        bar.update()

    ks = _some_ks(layers)
    held, chains = min(_HELD, number, len(sets[0].images) if sets else number), min(_CHAINS, number)
    frames = min(_FRAMES, settings.steps + 1)
    count = 2 * number + chains * (frames + 1) + held * (2 + _DRAWS * len(ks))
    size = thumbnail_size(count, prior.x_shape, _MOST_VALUES)
    sides = {
        "Gaussian prior": prior.sample(number, prior="generator", rng=stream(seed)),
        "Joint prior": prior.sample(number, rng=stream(seed), **options),
    }
    begun = ": the chain of a sample of the joint prior began at the sample of the Gaussian prior at the same place"
    begun = begun if settings.backend == _SAME_START else ""
    sections["samples"] = (
        "Samples under both priors",
        [
            f"{number} samples of each prior from the same seed{begun}. Choose an image to see it large, with the one of the "
            "other prior at its place."
        ],
        sample_views(sides, size),
    )
    bar.update()
    sections["chains"] = _chains(prior, chains, frames, seed, settings, options, size)
    bar.update()
    sections["held"] = _held(prior, sets[0] if sets else None, held, ks, seed, options, size)
    bar.update()
    bar.close()
    sections["scores"] = _scores(prior, scored, report)
    text = page(title, _facts(prior, settings, seed, scored, size), sections, size)
    write_whole(target, text.encode(), "page")
    return {"out": os.fspath(target), "bytes": len(text.encode()), **report}


# ------------------------------------------------------------------------------------------------------------- sections


def _chains(
    prior: JointEBMPrior,
    n: int,
    frames: int,
    seed: int,
    settings: ChainSettings,
    chain: Mapping[str, Any],
    size: tuple[int, int],
) -> tuple[str, list[str], str]:
    """Chains from their start to their end."""
    every = math.ceil(settings.steps / _MOST_POINTS)
    options: dict[str, Any] = {**chain, "steps": settings.steps}
    run = prior.trajectory(n, every=every, rng=stream(seed), **options)
    shown = torch.linspace(0, len(run.steps) - 1, frames).round().long().unique()
    images = prior.decode([z[shown].flatten(0, 1) for z in run.latents], rng=stream(seed)).unflatten(0, (len(shown), n))
    text = [
        f"{n} chains of {settings.steps} Langevin steps, and Σ f = f₁(z₁) + … along each, in nats: the higher, the more "
        "probable under the joint prior. Below a frame are its step and its Σ f; choose one, or a step of the curve, for more."
    ]
    before: list[tuple[Tensor, Tensor] | None] = [None] * n
    if settings.waymarks and have_waymarks(prior.energies):
        if settings.backend == _SAME_START:
            latents = prior.sample_latents(n, prior="generator", rng=stream(seed))
            start = prior.decode(latents, rng=stream(seed)).cpu()
            before = list(zip(start, prior.negative_energy(latents).detach().cpu(), strict=True))
        text.append(
            f"These energies have waymarks: from the draw of the Gaussian prior a chain crosses {settings.waymarks} of them "
            "before its step 0."
        )
    views = [
        ChainView(run.steps, run.negative_energy[:, i].cpu(), shown.tolist(), images[:, i].cpu(), before[i]) for i in range(n)
    ]
    return "Chains and their energies", text, chain_views(views, size)


def _held(
    prior: JointEBMPrior,
    known: Images | None,
    n: int,
    ks: Sequence[int],
    seed: int,
    chain: Mapping[str, Any],
    size: tuple[int, int],
) -> tuple[str, list[str], str]:
    """The layers above k held, those below redrawn, for every k."""
    layers = len(prior.energies)
    if known is None:
        latents = prior.sample_latents(n, rng=stream(seed), **chain)
        titles, what = [f"Sample {i}" for i in range(1, n + 1)], "samples of the joint prior (--data SOURCE takes real images)"
    else:
        x = known.images[:n].to(prior.device, prior.dtype)
        way: Any = {"method": "langevin" if find_infer(prior.generator) is None else "infer"}
        latents = prior.sample_posterior(x, rng=stream(seed), **way)
        titles, what = list(known.names[:n]), "a posterior draw of each image"
    rows = [prior.decode(latents, rng=stream(seed))[:, None]]
    for k in ks:
        given = {layer: latents[layer - 1].repeat_interleave(_DRAWS, 0) for layer in range(k + 1, layers + 1)}
        drawn = prior.sample(n * _DRAWS, given=given or None, rng=stream(seed), **chain)
        rows.append(drawn.unflatten(0, (n, _DRAWS)))
    views = [
        HeldView(
            title,
            [HeldRow(k, images[i].cpu()) for k, images in zip((0, *ks), rows, strict=True)],
            None if known is None else known.images[i],
        )
        for i, title in enumerate(titles)
    ]
    text = [
        f"Of {what}, the layers above k are held, and the k layers nearest the data are redrawn from the joint prior. What a "
        "row still has in common with the image is in the layers that it holds."
    ]
    if len(ks) < layers:
        text.append(f"Of the {layers} layers, {len(ks)} values of k are shown.")
    return "Layers held and redrawn", text, held_views(views, layers, size)


def _scores(prior: JointEBMPrior, scored: Sequence[ScoredSet], report: dict[str, Any]) -> tuple[str, list[str], str]:
    """Histograms; fills in the figures of the report."""
    title = "Scores"
    if not scored:
        text = (
            "With --data SOURCE there are histograms of the anomaly scores of known images here, with the images behind each "
            "bar, and with --other SOURCE those of other images below. The layers held are then those of real images."
        )
        return title, [text], ""
    text = [
        f'The score "{report["method"]}", in nats: the higher, the more unlike the known images. Choose a bar to see images '
        "behind it. The first and the last bar hold all scores beyond them."
    ]
    report |= {name: len(s.scores) for name, s in zip(("images", "other"), scored, strict=False)}
    report["unreadable"] = sum(s.left_out for s in scored)
    if report["method"] == "tails":
        report["threshold"] = prior.threshold(_QUANTILE)
        above = (f"{int((s.scores > report['threshold']).sum())} of {len(s.scores)} of {s.label}" for s in scored)
        text.append(
            f"The dashed line is at {in_short(report['threshold'])} nats: {_QUANTILE:.0%} of the images that the prior was "
            f"calibrated on stay below it. Above it are {', '.join(above)}."
        )
    if len(scored) > 1:
        report["auroc"] = detection(scored[0].scores, scored[1].scores).auroc
        text.append(f"AUROC of {scored[1].label} against {scored[0].label}: {report['auroc']:.3f}.")
    return title, text, score_views(scored, report["threshold"])


def _scored(prior: JointEBMPrior, label: str, given: Images, method: str, seed: int) -> ScoredSet:
    """Scores as `energy-prior score` gives them; images without one are counted."""
    x, names = given.images, given.names
    rows: list[dict[str, Any]] = []
    for first in range(0, len(x), _BATCH):
        part = x[first : first + _BATCH].to(prior.device, prior.dtype)
        rows += score_rows(prior, part, names[first : first + _BATCH], method, stream(seed, first))
    there = [i for i, row in enumerate(rows) if not row["error"]]
    if not there:
        raise DivergenceError(f"None of the {len(rows)} images of {label} has a finite score. {rows[0]['error']}")
    scores = torch.tensor([rows[i]["score"] for i in there], dtype=torch.float64)
    return ScoredSet(label, [names[i] for i in there], scores, x[there], len(rows) - len(there) + len(given.left_out))


# --------------------------------------------------------------------------------------------------------------- before


def _check(prior: JointEBMPrior, target: Path, number: int) -> None:
    """Whether there can be a page."""
    check_makes_images(prior)
    if number > _MOST_SAMPLES:
        raise ArgumentError(
            f"number: expected at most {_MOST_SAMPLES} samples on a page, got {number}. `energy-prior sample` writes any "
            "number, as files."
        )
    if target.suffix not in (".html", ".htm"):
        raise ArgumentError(f"out: expected a file ending in .html or .htm, got {os.fspath(target)!r}.")
    if target.is_dir():
        raise ArgumentError(f"out: expected a file to write to, but {os.fspath(target)!r} is a folder.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"out: there is no folder {os.fspath(target.parent)!r} to write the page to.")


def _named(prior: JointEBMPrior, name: str, given: Tensor | Images) -> Images:
    """Images with names, checked."""
    images = given.images if isinstance(given, Images) else given
    x = images.to("cpu", prior.dtype) if isinstance(images, Tensor) and images.is_floating_point() else images
    check_observations(name, x, prior.x_shape, prior.step_size.cpu(), prior.generator)
    names = given.names if isinstance(given, Images) else ()
    left_out = given.left_out if isinstance(given, Images) else {}
    return Images(x, None, None, names or tuple(f"image {i}" for i in range(1, len(x) + 1)), left_out)


def _some_ks(layers: int) -> list[int]:
    """1 … L, or some of them, from the first to the last."""
    return sorted({round(k) for k in torch.linspace(1, layers, min(layers, _MOST_ROWS)).tolist()})


def _facts(
    prior: JointEBMPrior, settings: ChainSettings, seed: int, scored: Sequence[ScoredSet], size: tuple[int, int]
) -> dict[str, str]:
    """What stands at the head of the page."""
    shapes = [" × ".join(map(str, shape)) for shape in prior.generator.latent_shapes]
    layers = ", ".join(f"{lowered('z', i)} ({shape})" for i, shape in enumerate(shapes, start=1))
    full = tuple(prior.x_shape[1:])
    scaled = f", shown as {size[0]} × {size[1]}" if size != full else ""
    step_size = in_short(settings.step_size or float(prior.step_size))
    facts = {
        "Generator": f"{type(prior.generator).__name__}, {len(shapes)} layers: {layers}",
        "Images": f"{full[0]} × {full[1]} pixels, {'grey' if prior.x_shape[0] == 1 else 'RGB'}{scaled}",
        "Chains": f"{settings.steps} steps in {prior.space} space, step size {step_size}",
        "Seed": str(seed),
    }
    if scored:
        facts["Scored"] = ", ".join(f"{len(s.scores)} images of {s.label}" for s in scored)
    return facts


def _run(options: argparse.Namespace) -> int:
    """The command."""
    check_device("--device", options.device)
    numbers = numbers_of(options, dict.fromkeys(("number", "limit", "steps", "seed"), int))
    limit = check_count("limit", numbers.pop("limit"))
    if options.other is not None and options.data is None:
        raise ArgumentError("--other: expected known images to compare with. Pass --data SOURCE too.")
    if options.other_split is not None and options.other is None:
        raise ArgumentError("--other-split: expected other images to take it of. Pass --other SOURCE too.")
    prior, reading = read_run(options.run, options.factory)
    prior = prior.to(options.device)
    _check(prior, check_path("out", options.out), check_count("number", numbers["number"]))
    reading = {} if options.as_found else reading
    splits = (options.split, options.other_split or options.split)
    channels, height, width = prior.x_shape
    size = height if height == width else None
    sets: dict[str, Images] = {}
    labels = []
    for name, source, split in zip(("data", "other"), (options.data, options.other), splits, strict=True):
        labels.append(f"{source} ({split})")
        if source is not None:
            sets[name] = load_images(
                source, split, size=size, channels=channels, limit=limit, label_column=False, on_error="skip", **reading
            )
    title = f"The joint prior of {options.run}"
    report = write_page(
        prior, options.out, **sets, labels=(labels[0], labels[1]), title=title, method=options.method, **numbers
    )
    if options.json:
        print(json.dumps(report))
    else:
        print(f"the page is in {report['out']} ({report['bytes'] / 1e6:.1f} MB): open it in a browser")
        if report["unreadable"]:
            print(f"{report['unreadable']} images could not be read or scored, and are not on it")
    return UNREADABLE if report["unreadable"] else 0
