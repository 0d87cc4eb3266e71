"""MNIST with one digit held out of training: how well the anomaly scores of a joint prior find it.

    python examples/anomaly_mnist.py --data path/to/mnist --digit 4    # parquet files or image folders; 15 minutes
    python examples/anomaly_mnist.py --data ylecun/mnist --protocol test_split
    python examples/anomaly_mnist.py --data path/to/mnist --quick      # a minute, to see that it runs

Protocols: "zenati" trains on 80% of the other digits of both splits and tests on the rest and on every image of the digit (a
third of the images tested on); "test_split" tests on the test split (a tenth); "development" is "zenati" on the training split
alone, for choosing settings. Writes to --out: results.json, and pictures: histograms.png (L^{>k} of known and unknown digits
for every k), curves.png (ROC, precision and recall), extremes.png (the least and the most anomalous images), explanation.png
(which terms of the score the most anomalous ones owe it to).
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command_line import add_options, default_device
from detecting import draw, neighbours, on
from torch import Tensor

from energy_prior import FlatEnergy, JointEBMPrior, LadderVAE, MLPEnergy, fit_elbo
from energy_prior.data import load_images
from energy_prior.evaluate import DetectionTask

PROTOCOLS = ("zenati", "test_split", "development")


def main() -> None:
    """Reads the command line and runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, data="ylecun/mnist", out="runs/anomaly_mnist")
    parser.add_argument("--digit", type=int, default=4, choices=range(10), help="held out of training")
    parser.add_argument("--protocol", default="zenati", choices=PROTOCOLS, help="what is trained and tested on")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the nets are small: more threads gain little
    shared: dict[str, Any] = {"quick": options.quick, "out": options.out, "device": options.device or default_device()}
    figures = run(options.data, options.digit, options.protocol, options.seed, **shared)
    print(json.dumps(figures, indent=2))


def run(
    data: str,
    digit: int,
    protocol: str,
    seed: int,
    *,
    quick: bool = False,
    out: Path | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, float]:
    """Trains on the known digits, scores, draws if there is a folder; returns every figure of every score by its name."""
    torch.manual_seed(seed)
    task = protocol_task(data, digit, protocol, seed)
    held_out = 300 if quick else 4000
    images, held = task.train[:-held_out], task.train[-held_out:]
    rng = torch.Generator().manual_seed(seed)
    shared: dict[str, Any] = {"rng": rng, "progress": progress}

    # 1. A ladder VAE of the known digits, its weights chosen by the ELBO of held-out ones.
    vae = LadderVAE((1, 28, 28), latent_dims=(12, 6), hidden=512).to(device)
    fit_elbo(
        vae, images, validation=held[:1000], learning_rate=1e-3, iterations=60 if quick else 12_000, log_every=20, **shared
    )

    # 2. Its joint prior, calibrated on held-out known digits.
    prior = JointEBMPrior(vae, [MLPEnergy(shape, hidden=(256, 256)).to(device) for shape in vae.latent_shapes])
    fit: dict[str, Any] = {"iterations": 30 if quick else 3000, "batch_size": 64 if quick else 512}
    prior.fit(images, "nce", **fit, **shared)
    prior.calibrate(held.to(device))

    # 3. What it has to beat: the same VAE without energies, with one on the top layer alone, and neighbours in pixels.
    gaussian = JointEBMPrior(vae)
    energies = [FlatEnergy(vae.latent_shapes[0]), MLPEnergy(vae.latent_shapes[1], hidden=(256, 256))]
    top = JointEBMPrior(vae, [energy.to(device) for energy in energies])
    top.fit(images, "nce", **fit, **shared)
    scores: dict[str, Callable[[Tensor], Any]] = {
        "": prior.anomaly_score,
        "log_joint": functools.partial(prior.anomaly_score, method="log_joint"),
        "negative_energy": functools.partial(prior.anomaly_score, method="negative_energy"),
        "reconstruction": functools.partial(prior.anomaly_score, method="reconstruction"),
        "gaussian_log_joint": gaussian.anomaly_score,
        "lebm": top.anomaly_score,
        "knn": neighbours(images),
    }
    scores = {name: score if name == "knn" else on(device, score) for name, score in scores.items()}
    figures = {str(row["metric"]): float(row["value"]) for row in task.rows(scores)}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        shown = {"tails (default)": scores[""], "log joint": scores["log_joint"], "neighbours": scores["knn"]}
        draw(out, prior, task, shown, "other digits", f"digit {digit}", 500)
        (out / "results.json").write_text(json.dumps({"case": task.name, "seed": seed, **figures}, indent=2) + "\n")
    return figures


def protocol_task(data: str, digit: int, protocol: str, seed: int) -> DetectionTask:
    """What is trained and tested on."""
    train = load_images(data, "train", channels=1)
    if train.labels is None:
        raise SystemExit(f"{data} has no labels, by which a digit could be held out.")
    name = f"{protocol}, digit {digit}"
    if protocol == "development":
        return DetectionTask.zenati(train.images, train.labels, digit, seed=seed, name=name)
    test = load_images(data, "test", channels=1)
    if protocol == "test_split":
        return DetectionTask.test_split(train, test, digit, name=name)
    both = [torch.cat([a, b]) for a, b in zip(train, test) if a is not None and b is not None]
    return DetectionTask.zenati(both[0], both[1], digit, seed=seed, name=name)


if __name__ == "__main__":
    main()
