"""`energy-prior train`: trains a generator and its joint prior as a recipe says."""

from __future__ import annotations

__all__ = ["READING", "add_command", "load_run", "read_run", "run_recipe"]

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from energy_prior import plots
from energy_prior._util import shown
from energy_prior.checkpoint import GENERATOR, check_state_fits, load_named
from energy_prior.checks.settings import check_path
from energy_prior.cli.recipe import DataSettings, Recipe, build_generator, read_recipe, settings_help
from energy_prior.data import load_images
from energy_prior.data.reader import ReadSettings
from energy_prior.errors import ArgumentError, CheckpointError
from energy_prior.generators.build import GeneratorFile, describe_generator, generator_of, read_generator, write_generator
from energy_prior.hub import GENERATOR_FILE, PRIOR_FILE
from energy_prior.prior import JointEBMPrior
from energy_prior.training import fit_elbo, launched_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator

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
    report: dict[str, Any] = {"images": len(train), "recipe": recipe.document()}
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
            "warnings": result.warnings,
        }
    if accelerator is None or accelerator.is_main_process:
        prior.calibrate(validation, rng=torch.Generator().manual_seed(recipe.seed))
        prior.save(out / PRIOR_FILE)
        _save_generator(out / GENERATOR_FILE, generator, recipe, x_shape)
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        after = prior.sample(_SHOWN, rng=torch.Generator().manual_seed(recipe.seed))
        if x_shape[0] in (1, 3):
            panels = {"images": validation[:_SHOWN], "samples, Gaussian prior": before, "samples, joint prior": after}
            plots.image_panels(out / "samples.png", panels)
    return report


def load_run(folder: str | os.PathLike[str], factory: str | None = None) -> JointEBMPrior:
    """The joint prior that a run of `energy-prior train` wrote to `folder`, around its generator, on the CPU.

    Args:
        folder: what the recipe calls "out".
        factory: "module:function", as in the recipe, where it names a factory of yours. The file names it too, but what is
            named in a file is never run: it could be any function.

    Raises:
        FileNotFoundError, CheckpointError: if the folder does not hold a finished run, or a file of it is damaged, or names
            another factory.
        ArgumentError: if the generator's factory cannot be imported, or there is none.

    Examples:
        >>> from importlib.resources import files
        >>> load_run(str(files("energy_prior") / "pretrained" / "digits"))  # a run's "out"
        JointEBMPrior(LadderVAE; z_1 (16,) MLPEnergy, z_2 (8,) MLPEnergy; space="noise", step_size=0.191)
    """
    return read_run(folder, factory)[0]


def read_run(folder: str | os.PathLike[str], factory: str | None = None) -> tuple[JointEBMPrior, dict[str, Any]]:
    """What `load_run` gives, and how the run's images were read: arguments of `load_images`; none where that is not known.

    Args:
        folder: as for `load_run`.
        factory: as for `load_run`.

    Raises:
        FileNotFoundError, CheckpointError, ArgumentError: as `load_run`.
    """
    file = read_generator(check_path("folder", folder) / GENERATOR_FILE)
    named = file.described.get("factory")
    if named is None and factory is not None:
        raise ArgumentError(
            f"factory: the generator in {os.fspath(folder)!r} is one of the library's, of no factory; got {shown(factory)}."
        )
    if named != factory:
        raise CheckpointError(
            f"{os.fspath(file.path)!r} says that its generator comes from the factory {shown(named)}, and a function is not "
            f"run because a file names it. If you trust it, pass factory={shown(named)} (on the command line: --factory)."
        )
    reading = _reading(file)
    if named is None:
        generator = generator_of(file)
    else:
        generator = build_generator(file.described, file.x_shape)
        check_state_fits(file.path, generator.state_dict(), file.weights, "the generator", "Is its factory still the same?")
        load_named(generator, file.weights)
    return JointEBMPrior.load(file.path.with_name(PRIOR_FILE), generator), reading


def _reading(file: GeneratorFile) -> dict[str, Any]:
    """What a file says of reading images, checked."""
    reading = {} if file.reading is None else file.reading
    try:
        whole = isinstance(reading, dict) and set(reading) <= set(READING)
        ReadSettings(**reading if whole else {})
    except (ArgumentError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{os.fspath(file.path)!r} is damaged: what it says of reading images is impossible, {shown(reading)}. "
            f"{GENERATOR.remedy}"
        )
    return reading


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
        if name != "recipe":
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
    reading = {name: getattr(recipe.data, name) for name in READING}
    described = recipe.generator if "factory" in recipe.generator else describe_generator(generator) or recipe.generator
    write_generator(path, generator, described, x_shape, reading)
