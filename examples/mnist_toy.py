"""Digits 0 and 1 of MNIST with two layers of 2-D latents: every Langevin transition can be seen.

    python examples/mnist_toy.py --data path/to/mnist           # or --data ylecun/mnist; two minutes, one core
    python examples/mnist_toy.py --data path/to/mnist --quick

Writes to --out: transitions.png (chains of the joint prior on their way over posterior draws, layer by layer), samples.png
and results.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from command_line import add_options

from energy_prior import JointEBMPrior, LadderVAE, fit_elbo, plots
from energy_prior.data import load_images
from energy_prior.evaluate import maximum_mean_discrepancy, two_sample_accuracy


def main() -> None:
    """Reads the command line and runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, data="ylecun/mnist", out="runs/mnist_toy", device=False)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(run(options.data, options.out, options.seed, options.quick), indent=2))


def run(data: str, out: Path, seed: int = 0, quick: bool = False, progress: bool = True) -> dict[str, Any]:
    """Trains, draws; returns what results.json holds."""
    out.mkdir(parents=True, exist_ok=True)
    everything = load_images(data, "train", channels=1, limit=3000 if quick else None)
    if everything.labels is None:
        raise SystemExit(f"{data} has no labels, which are needed to choose the digits 0 and 1.")
    images = everything.images[everything.labels <= 1]
    held_out = len(images) // 5
    images, test = images[:-held_out], images[-held_out:]

    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    vae = LadderVAE((1, 28, 28), latent_dims=(2, 2), hidden=256)
    fit_elbo(vae, images, validation=test[:500], iterations=60 if quick else 4000, rng=rng, progress=progress)
    prior = JointEBMPrior(vae)
    prior.fit(images, "nce", iterations=60 if quick else 3000, batch_size=64 if quick else 1024, rng=rng, progress=progress)

    # The chains start from the Gaussian prior and move to where the posterior is.
    run = prior.trajectory(500, steps=100, every=20, step_size=min(0.3, float(prior.step_size)), rng=rng)
    posterior = prior.sample_posterior(test[:1000], method="infer", rng=rng)
    plots.latent_transitions(out / "transitions.png", posterior, run.latents, run.steps)
    panels = {
        "real": test[:64],
        "Gaussian prior": prior.sample(64, prior="generator", rng=rng),
        "joint prior": prior.sample(64, rng=rng),
    }
    plots.image_panels(out / "samples.png", panels)

    def accuracy(name: Any) -> float:
        """Of telling this prior's draws from the posterior's; 0.5 is ideal."""
        train, unseen = (torch.cat(prior.sample_posterior(x, method="infer", rng=rng), 1) for x in (images[: len(test)], test))
        drawn = torch.cat(prior.sample_latents(2 * len(test), prior=name, rng=rng), 1)
        return two_sample_accuracy(train, drawn[: len(test)], unseen, drawn[len(test) :])

    def discrepancies(name: Any) -> list[float]:
        """Of this prior's draws from the aggregate posterior's, layer by layer, in a kernel as wide as the latter."""
        chain: dict[str, Any] = {"steps": 20 if quick else 1000} if name == "joint" else {}  # two modes apart take long chains
        posterior = prior.sample_posterior(images, method="infer", rng=rng)
        pairs = zip(posterior, prior.sample_latents(len(images), prior=name, rng=rng, **chain))
        return [maximum_mean_discrepancy(z, drawn) for z, drawn in pairs]

    results: dict[str, Any] = {"seed": seed, "accuracy_gaussian": accuracy("generator"), "accuracy_joint": accuracy("joint")}
    results |= {"mmd_gaussian": discrepancies("generator"), "mmd_joint": discrepancies("joint")}
    ratios = [joint / gaussian for gaussian, joint in zip(results["mmd_gaussian"], results["mmd_joint"]) if gaussian > 0]
    results["mmd_ratio_worst_layer"] = max(ratios, default=None)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
