"""A VAE and its joint prior on scikit-learn's handwritten digits, from images to a folder that others can use.

    python examples/digits.py --out digits
    python examples/digits.py --quick  # a few iterations; the figures mean nothing

It takes two minutes on one core. The folder holds both models as safetensors, a card with what was measured, and a picture;
`JointEBMPrior.from_pretrained("digits")` reads it, and `prior.push_to_hub("owner/digits", card)` would upload the same.
`energy_prior.load_example("digits")` is what `--out energy_prior/pretrained/digits` made.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits

from energy_prior import JointEBMPrior, LadderVAE, ModelCard, fit_elbo, plots


def main() -> None:
    """Trains, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="digits", help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few iterations, to see that it runs")
    options = parser.parse_args()
    iterations: dict[str, Any] = {"iterations": 20} if options.quick else {}

    torch.manual_seed(0)
    pixels, _ = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)  # 1,797 of them, in [0, 1]
    images = images[torch.randperm(len(images))]
    train, held_out, test = images[:1200], images[1200:1500], images[1500:]

    vae = LadderVAE((1, 8, 8), latent_dims=(16, 8), hidden=96)
    elbo = fit_elbo(vae, train, validation=held_out, input_noise=0.15, **iterations)
    prior = JointEBMPrior(vae)
    result = prior.fit(train, **iterations)
    prior.calibrate(held_out)

    # What was measured.
    threshold = prior.threshold(0.95)
    figures: dict[str, float | str] = {"training images": len(train)}
    if elbo.validation_elbo is not None:
        figures["ELBO of held-out images, nats"] = elbo.validation_elbo
    if result.mismatch is not None and result.mismatch.joint_accuracy is not None:
        figures["accuracy of telling posterior draws from those of the Gaussian prior"] = result.mismatch.accuracy
        figures["the same, from those of the joint prior"] = result.mismatch.joint_accuracy
    for name, x in (("upright", test), ("turned by 90 degrees", test.rot90(1, (2, 3)))):
        figures[f"share of the test digits that is flagged, {name}"] = float(
            (prior.anomaly_score(x) > threshold).float().mean()
        )
    for name, value in figures.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")

    # A picture, and everything in one folder.
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rngs = [torch.Generator().manual_seed(0) for _ in range(2)]
    panels = {
        "real": test[:64],
        "Gaussian prior": prior.sample(64, prior="generator", rng=rngs[0]),
        "joint prior": prior.sample(64, rng=rngs[1]),
    }
    plots.image_panels(out / "samples.png", panels)
    card = ModelCard(
        data="1,200 of scikit-learn's 1,797 scans of handwritten digits, 8×8: the test set of "
        "[Alpaydin and Kaynak's](https://archive.ics.uci.edu/dataset/80) (CC BY 4.0).",
        license="mit",
        figures=figures,
        settings={"generator": vae.config, "method": result.method, "fit": dataclasses.asdict(result.config)},
        pictures={"samples.png": out / "samples.png"},
        text='This prior comes with the package `energy-prior`: `energy_prior.load_example("digits")`.',
    )
    prior.save_pretrained(out, card)
    print(f"prior.safetensors, generator.safetensors, README.md and samples.png are in {out}/")


if __name__ == "__main__":
    main()
