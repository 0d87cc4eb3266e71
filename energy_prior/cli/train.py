"""`energy-prior train`: trains a generator and its joint prior as a recipe says."""

from __future__ import annotations

__all__ = ["READING", "add_command", "load_run", "reading_of", "run_recipe"]

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from energy_prior import plots
from energy_prior.checkpoint import check_state_fits, read_tensors, write_whole
from energy_prior.checks.settings import check_path
from energy_prior.cli.recipe import DataSettings, Recipe, build_generator, read_recipe, settings_help
from energy_prior.data import load_images
from energy_prior.errors import ArgumentError, CheckpointError
from energy_prior.prior import JointEBMPrior
from energy_prior.training import fit_elbo, launched_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator

_HEADER = "energy-prior train"
_SHOWN = 64
READING = ("value_range", "channel_order", "background")
"""Settings of `load_images` that say what pixels mean."""


def add_command(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "train",
        help="train a generator and its joint prior on images, from a YAML file or flags",
        description="Trains a generator by its ELBO, then its joint prior, and writes both, samples and a report. The same "
        "command after a kill goes on where it was. `accelerate launch -m energy_prior.cli train …` runs it on several "
        "processes, hosts or GPUs.",
    )
    parser.add_argument("config", nargs="?", help="the recipe, a YAML file; --settings lists what it can hold")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="e.g. elbo.iterations=500 or fit.0.method=joint; repeatable",
    )
    parser.add_argument("--data", metavar="SOURCE", help="the same as --set data.source=…")
    parser.add_argument("--out", metavar="FOLDER", help="the same as --set out=…")
    parser.add_argument("--seed", metavar="NUMBER", help="the same as --set seed=…")
    parser.add_argument("--device", metavar="DEVICE", help="the same as --set device=…")
    parser.add_argument("--settings", action="store_true", help="print every setting with its default and meaning, and stop")
    parser.set_defaults(command=_run, resumes=True)


def run_recipe(recipe: Recipe, accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Trains what the recipe says; the same call after a kill goes on where it was.

    Writes generator.safetensors, prior.safetensors, samples.png and report.json to `recipe.out`, and checkpoints of the
    runs in folders of it. The prior is calibrated on the validation images.

    Args:
        recipe: what to do.
        accelerator: the processes of a run on several; None: this process alone.

    Returns:
        What report.json holds.
    """
    out = check_path("out", recipe.out)
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"out: expected a folder to write to, but {recipe.out!r} is a file.")
    device = accelerator.device if accelerator else torch.device(recipe.device or "cpu")
    train, validation = _load_data(recipe.data)
    validation = validation.to(device)
    _check_batch_sizes(recipe, len(train) // (accelerator.num_processes if accelerator else 1))
    x_shape = tuple(train.shape[1:])

    torch.manual_seed(recipe.seed)
    generator = build_generator(recipe.generator, x_shape).to(device)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"images": len(train)}
    rng = torch.Generator().manual_seed(recipe.seed)
    if recipe.elbo is not None:
        elbo = fit_elbo(
            generator, train, validation=validation, config=recipe.elbo, run_dir=out / "elbo", accelerator=accelerator, rng=rng
        )
        report["elbo"] = {"validation_elbo": elbo.validation_elbo, "iteration": elbo.best_iteration}
    before = JointEBMPrior(generator).sample(_SHOWN, prior="generator", rng=torch.Generator().manual_seed(recipe.seed))
    prior = JointEBMPrior(generator)
    for i, (named, config) in enumerate(recipe.fit):
        name = f"fit-{i}" if named is None else f"fit-{i}-{named}"
        result = prior.fit(train, named, config=config, run_dir=out / name, accelerator=accelerator, rng=rng)
        report[name] = {
            "method": result.method,
            "last": result.history[-1],
            "mismatch": None if result.mismatch is None else dataclasses.asdict(result.mismatch),
            "step_size": result.step_size,
            "clipped": result.clipped,
            "cut_share": result.cut_share,
            "warnings": result.warnings,
        }
    if accelerator is None or accelerator.is_main_process:
        prior.calibrate(validation, rng=torch.Generator().manual_seed(recipe.seed))
        prior.save(out / "prior.safetensors")
        _save_generator(out / "generator.safetensors", generator, recipe, x_shape)
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        after = prior.sample(_SHOWN, rng=torch.Generator().manual_seed(recipe.seed))
        if x_shape[0] in (1, 3):
            panels = {"images": validation[:_SHOWN], "samples, Gaussian prior": before, "samples, joint prior": after}
            plots.image_panels(out / "samples.png", panels)
    return report


def load_run(folder: str | os.PathLike[str]) -> JointEBMPrior:
    """The joint prior that a run of `energy-prior train` wrote to `folder`, around its generator, on the CPU.

    Raises:
        FileNotFoundError, CheckpointError: if the folder does not hold a finished run, or a file of it is damaged.
        ArgumentError: if the generator's factory cannot be imported.
    """
    path = check_path("folder", folder) / "generator.safetensors"
    weights, described = _described(path)
    generator = build_generator(described["generator"], tuple(described["x_shape"]))
    check_state_fits(path, generator.state_dict(), weights, "the generator", "Is its factory still the same?")
    generator.load_state_dict(weights)
    return JointEBMPrior.load(path.with_name("prior.safetensors"), generator)


def reading_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """How the images of a run were read: arguments of `load_images`."""
    return _described(check_path("folder", folder) / "generator.safetensors")[1]["reading"]


def _described(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a run's generator, and what is said of it."""
    weights, header = read_tensors(path)
    if _HEADER not in header:
        raise CheckpointError(f"{os.fspath(path)!r} was not written by `energy-prior train`.")
    return weights, json.loads(header[_HEADER])


def _run(options: argparse.Namespace) -> int:
    """The command."""
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


def _load_data(data: DataSettings) -> tuple[Tensor, Tensor]:
    """Images to train on, and those held out."""
    try:
        images = load_images(
            data.source,
            data.split,
            size=data.size,
            channels=data.channels,
            limit=data.limit,
            column=data.column,
            label_column=False,
            value_range=data.value_range,
            channel_order=data.channel_order,
            background=data.background,
            on_error=data.on_error,
        ).images
    except ArgumentError as error:
        raise ArgumentError(f"data.{error}") from error
    if data.validation >= len(images):
        raise ArgumentError(f"data.validation: expected fewer than the {len(images)} images, got {data.validation}.")
    return images[: -data.validation], images[-data.validation :]


def _check_batch_sizes(recipe: Recipe, share: int) -> None:
    """No run needs larger batches than the `share` of the images that one process trains on."""
    for name, config in (("elbo", recipe.elbo), *((f"fit.{i}", config) for i, (_, config) in enumerate(recipe.fit))):
        if config is not None and config.batch_size is not None and config.batch_size > share:
            raise ArgumentError(
                f"{name}.batch_size: expected at most the {share} images that a process trains on, got {config.batch_size}."
            )


def _save_generator(path: Path, generator: nn.Module, recipe: Recipe, x_shape: tuple[int, ...]) -> None:
    """The generator's weights, with what `load_run` builds it from, and how its images were read."""
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in generator.state_dict().items()}
    reading = {name: getattr(recipe.data, name) for name in READING}
    described = {"generator": recipe.generator, "x_shape": list(x_shape), "reading": reading}
    write_whole(path, save(weights, {_HEADER: json.dumps(described)}))
