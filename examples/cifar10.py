"""CIFAR-10, joint training as in Cui, Wu and Han (CVPR 2023), on a convolutional generator that is written here.

    python examples/cifar10.py --data path/to/cifar10 --unknown path/to/svhn
    python examples/cifar10.py --data uoft-cs/cifar10                     # from the Hugging Face hub
    python examples/cifar10.py --data path/to/cifar10 --quick      # minutes on a CPU, to see that it runs

    accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16 examples/cifar10.py

The paper's setting: z_1 of 128 and z_2 of 100 dimensions, energies of 3 × 200 and 2 × 100 units, Langevin of 60 steps for the
prior and 40 for the posterior, likelihood σ = 0.3 on images in [−1, 1], batches of 100. Learning rates and step sizes are the
library's. The full size is meant for a GPU.

Writes to --out: samples.png (real | Gaussian prior | joint prior), long_chain.png (2,500 steps with their energy profile),
scores.png with --unknown, results.json, prior.safetensors, and checkpoints: the same command after a kill goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Literal

import torch
from command_line import add_options, default_device
from features import train_classifier
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from energy_prior import Inferred, JointEBMPrior, MLPEnergy, fit_elbo, map_batches, plots
from energy_prior.data import load_images
from energy_prior.evaluate import detection, excess_ratio, frechet_distance
from energy_prior.training import launched_accelerator


def main() -> None:
    """Reads the command line and runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, data="uoft-cs/cifar10", out="runs/cifar10")
    parser.add_argument("--unknown", help="images of another kind (SVHN), to score against the test images; their test split")
    options = parser.parse_args()
    options.device = options.device or default_device()
    with launched_accelerator(cpu=options.device == "cpu") as accelerator:  # None unless `accelerate launch` started this
        where = {"device": options.device, "accelerator": accelerator}
        results = run(options.data, options.out, options.unknown, options.seed, options.quick, **where)
    if accelerator is None or accelerator.is_main_process:
        print(json.dumps(results, indent=2))


class TwoLayers(nn.Module):
    """z_2 ~ N(0, I), z_1 | z_2 by an MLP, x | z_1 by transposed convolutions with noise σ; q(z_1 | x) q(z_2 | z_1)."""

    def __init__(self, width: int = 64, hidden: int = 200, dims: tuple[int, int] = (128, 100), sigma: float = 0.3) -> None:
        super().__init__()
        self.sigma = sigma
        d1, d2 = dims
        self.latent_shapes = (torch.Size((d1,)), torch.Size((d2,)))
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.SiLU(),
            nn.Flatten(), nn.Linear(4 * width * 16, 2 * d1),
        )  # fmt: skip
        self.encoder2 = mlp(d1, hidden, 2, 2 * d2)
        self.prior1 = mlp(d2, hidden, 4, 2 * d1)
        self.decoder = nn.Sequential(
            nn.Linear(d1, 4 * width * 16), nn.SiLU(), nn.Unflatten(1, (4 * width, 4, 4)),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def start(self, batch_size: int) -> Tensor:
        """Above z_2: zeros, the mean of p(z_2) = N(0, I)."""
        return next(self.parameters()).new_zeros(batch_size, *self.latent_shapes[1])

    def conditional(self, state: Tensor, layer: int) -> Normal:
        """p(z_2), and p(z_1 | z_2); the state is z_2."""
        if layer == 2:
            return Normal(state, torch.ones_like(state), validate_args=False)
        return normal(self.prior1(state))

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        """The state below z_i: z_i itself."""
        return z

    def likelihood(self, state: Tensor) -> Independent:
        """N(g(z_1), σ²) for every pixel; the decoder runs here, so chains that need no image never pay for it."""
        mean = self.decoder(state).float()  # autocast may have made it bf16, in which σ would be rounded too
        return Independent(Normal(mean, self.sigma, validate_args=False), 3, validate_args=False)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """A reparameterised draw, bottom-up."""
        latents, log_q, below = [], [], x
        for net in (self.encoder, self.encoder2):
            q = normal(net(below))
            below = q.loc + q.scale * torch.randn(q.loc.shape, generator=rng, dtype=q.loc.dtype, device=q.loc.device)
            latents.append(below)
            log_q.append(q.log_prob(below).sum(1))
        return Inferred(tuple(latents), torch.stack(log_q, 1))


def mlp(inner: int, hidden: int, depth: int, out: int) -> nn.Sequential:
    """`depth` hidden layers with smooth activations."""
    widths = [inner] + [hidden] * depth
    layers = [part for a, b in zip(widths, widths[1:]) for part in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers, nn.Linear(hidden, out))


def normal(parameters: Tensor) -> Normal:
    """Mean and log σ side by side, σ between e^−5 and e^5; in float32 also where autocast made the parameters."""
    loc, log_scale = parameters.float().chunk(2, dim=1)
    return Normal(loc, (5 * torch.tanh(log_scale / 5)).exp(), validate_args=False)


def run(
    data: str,
    out: Path,
    unknown: str | None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = True,
    device: str = "cpu",
    accelerator: Any = None,
) -> dict[str, Any]:
    """Trains, compares, draws; returns what results.json holds."""
    place = accelerator.device if accelerator else torch.device(device)
    out.mkdir(parents=True, exist_ok=True)

    # 1. Data in [−1, 1]: the last 1,000 training images choose the weights of the pretrained generator.
    train = load_images(data, "train", channels=3, limit=1500 if quick else None)
    test = load_images(data, "test", channels=3, limit=200 if quick else None)
    if train.labels is None:
        raise SystemExit(f"{data} has no labels, which the classifier behind the Fréchet distance needs.")
    held_out = 200 if quick else 1000
    images, labels = train.images[:-held_out] * 2 - 1, train.labels[:-held_out]
    validation, known = (train.images[-held_out:] * 2 - 1).to(place), test.images * 2 - 1

    # 2. A short training by the ELBO, so that the posterior's chains start near it; then the paper's joint training.
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    generator = (TwoLayers(width=8, hidden=64) if quick else TwoLayers()).to(place)
    shared: dict[str, Any] = {"accelerator": accelerator, "rng": rng, "progress": progress, "batch_size": 100}
    length: dict[str, Any] = {"iterations": 20, "log_every": 10} if quick else {"iterations": 20_000, "log_every": 1000}
    elbo = fit_elbo(generator, images, validation=validation, learning_rate=1e-3, run_dir=out / "elbo", **length, **shared)
    before = JointEBMPrior(generator)
    gaussian_samples = map_batches(
        before.sample, len(known), batch_size=500, seed=seed, prior="generator", accelerator=accelerator
    )
    energies = [MLPEnergy((128,), hidden=(200, 200, 200)), MLPEnergy((100,), hidden=(100, 100))]
    prior = JointEBMPrior(generator, [energy.to(place) for energy in energies])
    size: dict[str, Any] = {"iterations": 6, "steps": 5, "posterior_steps": 5} if quick else {
        "iterations": 40_000, "steps": 60, "posterior_steps": 40, "checkpoint_every": 1000, "sample_every": 2000
    }  # fmt: skip
    fit = prior.fit(images, "joint", run_dir=out / "fit", **size, **shared)

    # 3. Fréchet distances to the test images, in the features of a small classifier: they do not compare with published
    # FIDs, which take another net. The excess over the floor, that of training images, is compared.
    features = train_classifier(images, labels, 60 if quick else 4000, place)
    samples = map_batches(prior.sample, len(known), batch_size=500, seed=seed, accelerator=accelerator)
    floor = frechet_distance(features(images[: len(known)]), features(known))
    gaussian, joint = (frechet_distance(features(x), features(known)) for x in (gaussian_samples, samples))
    chain = prior.trajectory(32, steps=60 if quick else 2500, every=20 if quick else 125, rng=rng)
    results: dict[str, Any] = {
        "seed": seed,
        "validation_elbo": elbo.validation_elbo,
        "frechet_floor": floor,
        "frechet_generator": gaussian,
        "frechet_joint": joint,
        "frechet_excess_ratio": excess_ratio(joint, gaussian, floor),
        "step_size": fit.step_size,
        "acceptance": float(chain.acceptance[1:].mean()),
        "largest_energy": max(h["max_energy"] for h in fit.history),
        "warnings": fit.warnings,
    }

    # 4. Scores of images of another kind.
    scores: dict[str, tuple[Tensor, Tensor]] = {}
    if unknown is not None:
        strange = load_images(unknown, "test", channels=3, size=32).images * 2 - 1
        prior.calibrate(validation, rng=rng)
        for name in ("tails", "log_joint", "negative_energy"):
            inside, outside = (
                map_batches(prior.anomaly_score, x.to(place), seed=seed, accelerator=accelerator, method=name)
                for x in (known, strange)
            )
            scores[name] = inside, outside
            results[f"auroc_{name}"] = detection(inside, outside).auroc
    if accelerator is not None and not accelerator.is_main_process:
        return results

    # 5. Pictures, and everything that is needed to sample again.
    def grid(which: Literal["known", "generator", "joint"]) -> Tensor:
        return ({"known": known, "generator": gaussian_samples, "joint": samples}[which][:64] + 1) / 2

    plots.image_panels(
        out / "samples.png", {"real": grid("known"), "Gaussian prior": grid("generator"), "joint prior": grid("joint")}
    )
    frames = [prior.decode([z[i, :8] for z in chain.latents]).cpu() for i in range(len(chain.steps))]
    plots.chain_strip(out / "long_chain.png", (torch.stack(frames, 1) + 1) / 2, chain.steps, chain.negative_energy.sum(2))
    if scores:
        plots.score_histograms(out / "scores.png", scores, known="known test images", unknown="unknown images")
    prior.save(out / "prior.safetensors")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
