"""The demo: real 8×8 digits with one digit held out; a VAE, its joint prior, samples, scores and pictures in a minute."""

from __future__ import annotations

__all__ = ["DemoData", "DemoSettings", "load_demo_data", "run_demo"]

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from energy_prior import plots
from energy_prior.checks.arguments import require_extra
from energy_prior.errors import ArgumentError
from energy_prior.evaluate import detection, excess_ratio, frechet_distance, two_sample_accuracy
from energy_prior.generators import LadderVAE
from energy_prior.model import decode_latents
from energy_prior.prior import JointEBMPrior
from energy_prior.training import fit_elbo

SCORES = ("calibrated", "log_joint", "negative_energy", "reconstruction")
"""The anomaly scores that the demo reports, the default one first."""


FIT: dict[str, Any] = {"learning_rate": 1e-3, "gradient_clip": 1.0, "target_acceptance": 0.9}
NCE: dict[str, Any] = FIT | {"batch_size": 1024, "weight_decay": 0.1, "energy_penalty": 5e-3}
ML: dict[str, Any] = FIT | {"persistent": 2048, "restart": 0.05, "ema_decay": 0.98}
"""What differs from `FitConfig`: few images, so a strong weight decay; a short finish by maximum likelihood; larger steps."""


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """What the demo does, the same for every seed and digit; chosen with digits 0, 2 and 6 unknown on seeds 100–104.

    Attributes:
        unknown: the digit that is held out of training.
        seed: of the split and of everything random.
        device: where to compute.
        vae_iterations: updates of the VAE.
        nce_iterations: updates of the energies by noise contrastive estimation.
        ml_iterations: further updates by maximum likelihood with persistent Langevin chains.
        draws: posterior draws per image in the two-sample test.
        repeats: sample sets that the Fréchet distances are averaged over.
        progress: show progress bars.
    """

    unknown: int = 9
    seed: int = 0
    device: str = "cpu"
    vae_iterations: int = 2500
    nce_iterations: int = 1500
    ml_iterations: int = 200
    draws: int = 10
    repeats: int = 5
    progress: bool = True

    def quick(self) -> DemoSettings:
        """The same path in seconds, to see that it runs; its figures mean nothing."""
        return dataclasses.replace(self, vae_iterations=60, nce_iterations=40, ml_iterations=4, draws=2, repeats=2)


@dataclasses.dataclass(frozen=True)
class DemoData:
    """Images in [0, 1], (n, 1, 8, 8), split by a seed: known digits for training, validation and test, and the unknown one."""

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    test: Tensor
    test_labels: Tensor
    unknown: Tensor


def load_demo_data(unknown: int, seed: int, device: str = "cpu") -> DemoData:
    """scikit-learn's 1,797 scans of handwritten digits, of the known ones 64% train, 11% validation, 25% test, stratified."""
    if unknown not in range(10):
        raise ArgumentError(f"unknown: expected a digit from 0 to 9, got {unknown!r}.")
    datasets = require_extra("sklearn.datasets", "examples")
    split = require_extra("sklearn.model_selection", "examples").train_test_split
    pixels, digits = datasets.load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32, device=device).reshape(-1, 1, 8, 8)
    labels = torch.tensor(digits, device=device)
    known = (labels != unknown).nonzero().flatten().cpu().numpy()
    rest, test = split(known, test_size=0.25, random_state=seed, stratify=digits[known])
    train, validation = split(rest, test_size=0.15, random_state=seed, stratify=digits[rest])
    return DemoData(images[train], labels[train], images[validation], images[test], labels[test], images[labels == unknown])


def run_demo(settings: DemoSettings, out: str | Path | None = "energy-prior-demo") -> dict[str, Any]:
    """Trains, samples, scores, draws and writes the report.

    Args:
        settings: what to do.
        out: folder for samples.png, langevin.png, scores.png and report.json; None: write nothing.

    Returns:
        What report.json holds.
    """
    begin = time.perf_counter()
    device = torch.device(settings.device)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)  # now, not after the training
    data = load_demo_data(settings.unknown, settings.seed, settings.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        vae = LadderVAE((1, 8, 8), latent_dims=(16, 8)).to(device)
        elbo = fit_elbo(
            vae,
            data.train,
            validation=data.validation,
            iterations=settings.vae_iterations,
            input_noise=0.15,
            progress=settings.progress,
        )
        prior = JointEBMPrior(vae)
        nce = prior.fit(data.train, "nce", iterations=settings.nce_iterations, progress=settings.progress, **NCE)
        ml = prior.fit(data.train, "two_stage", iterations=settings.ml_iterations, progress=settings.progress, **ML)
        prior.calibrate(data.validation)
        trained = time.perf_counter()
        report: dict[str, Any] = {
            "unknown_digit": settings.unknown,
            "seed": settings.seed,
            "images": {name: len(getattr(data, name)) for name in ("train", "validation", "test", "unknown")},
            "vae": {"validation_elbo": elbo.validation_elbo, "iteration": elbo.best_iteration},
            "fit": {
                "step_size": ml.step_size,
                "nce_loss": nce.history[-1]["loss"],
                "largest_energy": max(h["max_energy"] for h in (*nce.history, *ml.history)),
                "acceptance": ml.history[-1]["acceptance"],
                "clipped": {"nce": nce.clipped["energies"], "two_stage": ml.clipped["energies"]},
            },
            "samples": _compare_samples(prior, data, settings),
            "latents": _compare_latents(prior, data, settings),
        }
        scores = {name: (prior.anomaly_score(data.test, name), prior.anomaly_score(data.unknown, name)) for name in SCORES}
        report["scores"] = {name: detection(*pair)._asdict() for name, pair in scores.items()}
        report["seconds"] = {"training": trained - begin, "all": 0.0}
        if out is not None:
            _draw(Path(out), prior, data, settings, scores)
        report["seconds"]["all"] = time.perf_counter() - begin
    if out is not None:
        (Path(out) / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _compare_samples(prior: JointEBMPrior, data: DemoData, settings: DemoSettings) -> dict[str, float]:
    """Fréchet distances to the test images at equal counts, in the features of a small classifier of the known digits."""
    classify = _train_classifier(data, settings)
    accuracy = float((classify(data.test).argmax(1) == data.test_labels).double().mean())
    features = classify[:-1]
    n = len(data.test)

    def distance(draw: Callable[[], Tensor]) -> float:
        """Mean over repeats of the distance of n images to the n test images."""
        with torch.no_grad():
            test = features(data.test)
            distances = [frechet_distance(features(draw()), test) for _ in range(settings.repeats)]
        return sum(distances) / len(distances)

    floor = distance(lambda: data.train[torch.randperm(len(data.train), device=data.train.device)[:n]])
    generator = distance(lambda: prior.sample(n, prior="generator"))
    joint = distance(lambda: prior.sample(n))
    return {
        "classifier_accuracy": accuracy,
        "frechet_floor": floor,
        "frechet_generator": generator,
        "frechet_joint": joint,
        "frechet_excess_ratio": excess_ratio(joint, generator, floor),
    }


def _train_classifier(data: DemoData, settings: DemoSettings) -> nn.Sequential:
    """The feature net: 64 → 128 → 64 → 10 with dropout, whose 64 hidden units are the features."""
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(64, 10),
    ).to(data.train.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(min(1500, settings.vae_iterations)):
        rows = torch.randint(len(data.train), (128,), device=data.train.device)
        loss = nn.functional.cross_entropy(net(data.train[rows]), data.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def _compare_latents(prior: JointEBMPrior, data: DemoData, settings: DemoSettings) -> dict[str, float]:
    """Two-sample tests in latent space: posterior draws of test images against draws of each prior.

    The classifier learns on posterior draws of training images and as many prior draws.
    """

    def posterior(x: Tensor) -> Tensor:
        draws = [torch.cat(prior.sample_posterior(x, method="infer"), 1) for _ in range(settings.draws)]
        return torch.cat(draws)

    train, test = posterior(data.train), posterior(data.test)
    accuracy: dict[str, float] = {}
    priors: tuple[Literal["generator", "joint"], ...] = ("generator", "joint")
    for name in priors:
        drawn = torch.cat(prior.sample_latents(len(train) + len(test), prior=name), 1)
        accuracy[name] = two_sample_accuracy(train, drawn[: len(train)], test, drawn[len(train) :])
    return {
        "c2st_generator": accuracy["generator"],
        "c2st_joint": accuracy["joint"],
        "c2st_ratio": abs(accuracy["joint"] - 0.5) / max(abs(accuracy["generator"] - 0.5), 1e-12),
    }


def _draw(
    out: Path, prior: JointEBMPrior, data: DemoData, settings: DemoSettings, scores: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """samples.png, langevin.png and scores.png."""
    n = 64
    plots.image_panels(
        out / "samples.png",
        {
            "real digits": data.test[:n],
            "samples, Gaussian prior": prior.sample(n, prior="generator"),
            "samples, joint prior": prior.sample(n),
        },
    )
    chains, every = 8, 5
    run = prior.trajectory(chains, steps=75, every=every)
    frames = [decode_latents(prior.generator, [z[i] for z in run.latents]).detach() for i in range(len(run.steps))]
    energy = run.negative_energy.sum(2)
    plots.chain_strip(out / "langevin.png", torch.stack(frames, 1), run.steps, energy)
    plots.score_histograms(
        out / "scores.png",
        scores,
        known="known digits (test images)",
        unknown=f"digit {settings.unknown}, never seen in training",
    )
