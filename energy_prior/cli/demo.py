"""`energy-prior demo`: real 8×8 digits with one digit held out; a VAE, its joint prior, samples, scores and pictures."""

from __future__ import annotations

__all__ = ["SCORES", "DemoData", "DemoSettings", "add_command", "load_demo_data", "run_demo"]

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from energy_prior import plots
from energy_prior.checks.settings import check_device, check_path, require_extra
from energy_prior.errors import ArgumentError
from energy_prior.evaluate import detection, excess_ratio, frechet_distance, two_sample_accuracy
from energy_prior.generators import LadderVAE
from energy_prior.prior import JointEBMPrior
from energy_prior.training import fit_elbo

SCORES = ("tails", "log_joint", "negative_energy", "reconstruction")
"""The anomaly scores that the demo reports."""

# Where the fits differ from the defaults of `FitConfig`: few images ask for a strong weight decay.
_NCE: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 1024, "weight_decay": 0.1}
_ML: dict[str, Any] = {"learning_rate": 1e-3, "persistent": 2048, "restart_probability": 0.05, "ema_decay": 0.98}


def add_command(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "demo",
        help="train and compare on real 8x8 digits, in a minute, with no download",
        description="Trains a two-layer VAE and its joint prior on scikit-learn's bundled digits with one digit held out, and "
        "writes samples.png, langevin.png, scores.png and report.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--unknown", type=int, default=9, metavar="DIGIT", help="the digit held out of training")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the training and the samples")
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, …")
    parser.add_argument("--out", default="energy-prior-demo", help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few iterations, to see that it runs; the figures mean nothing")
    parser.set_defaults(command=_run)


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo. The numbers of iterations were chosen with digits 0, 2 and 6 unknown on seeds 100–104.

    Attributes:
        unknown: the digit that is held out of training, 0 … 9.
        seed: seed of the split, the training and the samples.
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
    nce_iterations: int = 1000
    ml_iterations: int = 200
    draws: int = 5
    repeats: int = 5
    progress: bool = True

    def quick(self) -> DemoSettings:
        """The same with few iterations, to see that it runs; the figures mean nothing."""
        return dataclasses.replace(self, vae_iterations=30, nce_iterations=20, ml_iterations=2, draws=1, repeats=1)


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
    """Trains a VAE and its joint prior, compares samples and scores, draws pictures and writes the report.

    Args:
        settings: what to do.
        out: folder for samples.png, langevin.png, scores.png and report.json; None: write nothing.

    Returns:
        What report.json holds.
    """
    begin = time.perf_counter()
    device = torch.device(settings.device)
    folder = None if out is None else check_path("out", out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # before the training, so that an error comes at once
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
        nce = prior.fit(data.train, "nce", iterations=settings.nce_iterations, progress=settings.progress, **_NCE)
        ml = prior.fit(data.train, "two_stage", iterations=settings.ml_iterations, progress=settings.progress, **_ML)
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
            },
            "samples": _compare_samples(prior, data, settings),
            "latents": _compare_latents(prior, data, settings),
        }
        scores = {name: (prior.anomaly_score(data.test, name), prior.anomaly_score(data.unknown, name)) for name in SCORES}
        report["scores"] = {name: detection(*pair)._asdict() for name, pair in scores.items()}
        report["seconds"] = {"training": trained - begin, "all": 0.0}
        if folder is not None:
            _draw(folder, prior, data, settings, scores)
        report["seconds"]["all"] = time.perf_counter() - begin
    if folder is not None:
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _run(options: argparse.Namespace) -> int:
    """The command."""
    check_device("--device", options.device)
    out = check_path("--out", options.out)
    torch.set_num_threads(1)  # the nets are tiny: more threads gain nothing, and stall where other programs run
    settings = DemoSettings(unknown=options.unknown, seed=options.seed, device=options.device)
    report = run_demo(settings.quick() if options.quick else settings, out)
    print(_table(report, out))
    if options.quick:
        print("--quick: these figures only show that everything runs.")
    return 0


def _table(report: dict[str, Any], out: Path) -> str:
    """The report as text for the terminal."""
    samples, latents, scores = report["samples"], report["latents"], report["scores"]
    unknown = report["unknown_digit"]
    rows = [
        ("", "Gaussian prior", "joint prior", "ideal"),
        (
            "Fréchet distance of samples to test digits",
            f"{samples['frechet_generator']:.2f}",
            f"{samples['frechet_joint']:.2f}",
            f"{samples['frechet_floor']:.2f}",
        ),
        (
            "accuracy of telling latents from the posterior's",
            f"{latents['c2st_generator']:.3f}",
            f"{latents['c2st_joint']:.3f}",
            "0.500",
        ),
    ]
    lines = [f"{a:<50}{b:>16}{c:>14}{d:>8}" for a, b, c, d in rows]
    lines += ["", f"{f'unknown digit {unknown} against known ones':<50}{'AUROC':>16}{'AUPRC':>14}"]
    lines += [f"  score {name!r:<42}{s['auroc']:>16.3f}{s['auprc']:>14.3f}" for name, s in scores.items()]
    lines += [
        "",
        f"Excess of the Fréchet distance over its floor: {samples['frechet_excess_ratio']:.2f} of the Gaussian prior's.",
        f"{report['seconds']['all']:.0f} s. Pictures and report.json are in {out}/",
    ]
    return "\n".join(lines)


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
    frames = [prior.decode([z[i] for z in run.latents]) for i in range(len(run.steps))]
    energy = run.negative_energy.sum(2)
    plots.chain_strip(out / "langevin.png", torch.stack(frames, 1), run.steps, energy)
    plots.score_histograms(
        out / "scores.png",
        scores,
        known="known digits (test images)",
        unknown=f"digit {settings.unknown}, never seen in training",
    )
