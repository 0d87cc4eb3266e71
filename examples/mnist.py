"""MNIST, two layers, two stages: a ladder VAE, then its joint prior by multi-stage NCE, and what that does to its samples.

    python examples/mnist.py --data path/to/mnist         # parquet files or image folders; about half an hour, one core
    python examples/mnist.py --data ylecun/mnist                 # from the Hugging Face hub
    python examples/mnist.py --data path/to/mnist --quick # a minute, to see that it runs

    accelerate launch --multi_gpu --num_processes 2 examples/mnist.py --data ylecun/mnist
    accelerate launch --multi_gpu --num_processes 2 examples/mnist.py --data path/to/mnist --device cpu --quick

Writes to --out: samples.png (real | Gaussian prior | joint prior), long_chain.png (chains of 1,000 steps with their energy
profile), results.json, prior.safetensors, and checkpoints: the same command after a kill goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from command_line import add_options, default_device
from features import train_classifier
from torch import Tensor

from energy_prior import JointEBMPrior, LadderVAE, MLPEnergy, fit_elbo, map_batches, plots
from energy_prior.data import load_images
from energy_prior.evaluate import effective_sample_size, excess_ratio, frechet_distance
from energy_prior.training import launched_accelerator


def main() -> None:
    """Reads the command line and runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, data="ylecun/mnist", out="runs/mnist")
    options = parser.parse_args()
    options.device = options.device or default_device()
    if options.device == "cpu":
        torch.set_num_threads(1)  # the nets are small: more threads gain little
    with launched_accelerator(cpu=options.device == "cpu") as accelerator:  # None unless `accelerate launch` started this
        results = run(options.data, options.out, options.seed, options.device, options.quick, accelerator=accelerator)
    if accelerator is None or accelerator.is_main_process:
        print(json.dumps(results, indent=2))


def run(
    data: str,
    out: Path,
    seed: int = 0,
    device: str = "cpu",
    quick: bool = False,
    progress: bool = True,
    accelerator: Any = None,
) -> dict[str, Any]:
    """Trains, compares, draws; returns what results.json holds."""
    place = accelerator.device if accelerator else torch.device(device)
    out.mkdir(parents=True, exist_ok=True)

    # 1. Data: 59,000 images to train on, 1,000 to choose the VAE's weights by, 9,000 test images to compare samples with.
    train = load_images(data, "train", channels=1, limit=3000 if quick else None)
    test = load_images(data, "test", channels=1, limit=500 if quick else 9000)
    if train.labels is None:
        raise SystemExit(f"{data} has no labels, which the classifier behind the Fréchet distance needs.")
    held_out = 500 if quick else 1000
    images, labels = train.images[:-held_out], train.labels[:-held_out]
    validation = train.images[-held_out:].to(place)

    # 2. The backbone, trained to KL weight 1 and chosen by its validation ELBO before any energy exists.
    torch.manual_seed(seed)
    vae = LadderVAE((1, 28, 28), latent_dims=(16, 8), hidden=512).to(place)
    rng = torch.Generator().manual_seed(seed)
    shared: dict[str, Any] = {"accelerator": accelerator, "rng": rng, "progress": progress}
    length: dict[str, Any] = {"iterations": 60, "log_every": 20} if quick else {"iterations": 10_000, "log_every": 500}
    elbo = fit_elbo(vae, images, validation=validation, learning_rate=1e-3, run_dir=out / "elbo", **length, **shared)

    # 3. The joint prior: three ratio estimates, each against samples of the prior before it; the VAE stays as it is.
    prior = JointEBMPrior(vae, [MLPEnergy(shape, hidden=(256, 256)).to(place) for shape in vae.latent_shapes])
    size: dict[str, Any] = {"iterations": 5400, "batch_size": 1024, "persistent": 8192}
    if quick:
        size = {"iterations": 30, "batch_size": 128, "persistent": 256}
    fit = prior.fit(images, "multi_stage_nce", stages=3, steps=60, run_dir=out / "fit", **size, **shared)

    # 4. Fréchet distances to the test images at equal counts, in the 64 features of a classifier of the digits. Training
    # images have one too, the floor: what is compared is the excess over it, as the mean over several draws of the images.
    features = train_classifier(images, labels, 60 if quick else 4000, place)
    reference = features(test.images)

    def some_images(_: int) -> Tensor:
        return images[torch.randperm(len(images), generator=rng)[: len(test.images)]]

    def samples(**chain: Any) -> Callable[[int], Tensor]:
        n = len(test.images)
        return lambda k: map_batches(prior.sample, n, batch_size=3000, seed=100 * seed + k, accelerator=accelerator, **chain)

    def distance(draw: Callable[[int], Tensor], draws: int) -> float:
        return sum(frechet_distance(features(draw(k)), reference) for k in range(draws)) / draws

    few, many = (1, 1) if quick else (3, 6)
    floor = distance(some_images, many)
    gaussian, short = distance(samples(prior="generator"), many), distance(samples(steps=60), many)
    long = distance(samples(steps=100 if quick else 1000), few)

    # 5. Long chains: do they hold, and do they move?
    chain = prior.trajectory(64, steps=100 if quick else 1000, every=10, rng=rng)
    everything = torch.cat([chain.negative_energy.sum(2, keepdim=True), *chain.latents], dim=2)
    effective = effective_sample_size(everything)
    results = {
        "seed": seed,
        "validation_elbo": elbo.validation_elbo,
        "frechet_floor": floor,
        "frechet_generator": gaussian,
        "frechet_joint": short,
        "frechet_joint_1000_steps": long,
        "frechet_excess_ratio": excess_ratio(short, gaussian, floor),
        "long_over_short": (long - floor) / (short - floor),
        "step_size": fit.step_size,
        "acceptance": float(chain.acceptance[1:].mean()),
        "effective_samples_energy": float(effective[0]),
        "effective_samples_mean": float(effective.mean()),
        "effective_samples_least": float(effective.min()),
        "largest_energy": max(h["max_energy"] for h in fit.history),
        "warnings": fit.warnings,
    }
    if accelerator is not None and not accelerator.is_main_process:
        return results

    # 6. Pictures, and everything that is needed to sample again.
    def grid(which: Literal["generator", "joint"]) -> Tensor:
        return prior.sample(64, prior=which, rng=rng)

    panels = {"real": test.images[:64], "Gaussian prior": grid("generator"), "joint prior": grid("joint")}
    plots.image_panels(out / "samples.png", panels)
    shown = range(0, len(chain.steps), max(1, len(chain.steps) // 20))
    frames = torch.stack([prior.decode([z[i, :8] for z in chain.latents]) for i in shown], 1)
    plots.chain_strip(out / "long_chain.png", frames, chain.steps[list(shown)], chain.negative_energy.sum(2)[list(shown)])
    prior.save(out / "prior.safetensors")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
