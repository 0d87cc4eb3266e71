"""One image set against another: how well the scores of a joint prior tell images of a set that it was not trained on.

    python examples/ood.py --known DATA/mnist --unknown DATA/omniglot28          # ten minutes, one core
    python examples/ood.py --known DATA/cifar10 --unknown DATA/svhn --jpeg 75    # two hours; the unknown ones as JPEG first
    python examples/ood.py --known DATA/mnist --unknown DATA/omniglot28 --quick

Sets are folders of parquet files or images, or names on the Hugging Face hub. The test images of the known set stand against
those of the unknown one, at equal size; in the case KNOWN/KNOWN_train against its training images, which no score should find.
k of LLR^{>k} is the largest whose layers above it carry a tenth of KL(q ‖ p_β) or more on held-out known images. Writes to
--out: results.json, histograms.png, curves.png, extremes.png, explanation.png.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command_line import default_device, user_path
from detecting import draw, neighbours, on
from PIL import Image
from torch import Tensor

from energy_prior import JointEBMPrior, LadderVAE, ResidualVAE, fit_elbo
from energy_prior.data import load_images
from energy_prior.evaluate import DetectionTask


def main() -> None:
    """Reads the command line and runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=user_path, default="runs/ood", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--quick", action="store_true", help="small nets and few iterations; the figures mean nothing")
    parser.add_argument("--known", required=True, help="the set to train on")
    parser.add_argument("--unknown", required=True, help="the other one; its split is test, or train where it has no other")
    parser.add_argument("--jpeg", type=int, help="quality at which the unknown images are compressed first")
    parser.add_argument("--device", default=None, help="cpu, cuda, …; default: a GPU if there is one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    unknown = [(Path(options.unknown).name, options.unknown, options.jpeg)]
    shared: dict[str, Any] = {"quick": options.quick, "out": options.out, "device": options.device or default_device()}
    found = run(options.known, unknown, options.seed, **shared)
    print(json.dumps(found, indent=2))


def run(
    known: str,
    unknown: list[tuple[str, str, int | None]],
    seed: int,
    *,
    size: int | None = None,
    name: str | None = None,
    quick: bool = False,
    out: Path | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Trains on a set, and scores it against others.

    Args:
        known: the set to train on.
        unknown: name, set and JPEG quality (None: as they are) of each of the others.
        seed: of everything random.
        size: that all images are scaled to; None: that of the known ones.
        name: of the known set in the cases; None: that of its folder.
        quick: small nets and few iterations.
        out: folder of the pictures, of the first pair; None: none are drawn.
        device: where the model is.
        progress: show it.

    Returns:
        Case -> figure -> value.
    """
    limit = 200 if quick else None
    images = load_images(known, "train", limit=limit, size=size).images
    held_out = 50 if quick else 5000
    train, held = images[:-held_out], images[-held_out:]
    if has_test(known):
        test = load_images(known, "test", limit=limit, size=size).images
    else:
        train, test = train[:-held_out], train[-held_out:]
    channels, side = images.shape[1], images.shape[2]
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    shared: dict[str, Any] = {"rng": rng, "progress": progress}

    # 1. A hierarchical VAE: small layers of vectors for gray images, maps for others; and its joint prior.
    if channels == 1:
        vae: Any = LadderVAE(images.shape[1:], latent_dims=(16, 8), hidden=512)
        length: dict[str, Any] = {"iterations": 4000, "learning_rate": 1e-3}
        fit: dict[str, Any] = {"iterations": 3000, "batch_size": 512, "method": "nce"}
    else:
        vae = ResidualVAE(images.shape[1:], groups=(2, 1, 1), channels=8 if quick else 24, latent_channels=8, downsample=2)
        length = {"iterations": 3500, "batch_size": 64}
        fit = {"iterations": 1000, "batch_size": 128, "method": "denoising"}
    if quick:
        length, fit = length | {"iterations": 20, "batch_size": 64}, fit | {"iterations": 10, "batch_size": 64}
    vae = vae.to(device)
    fit_elbo(vae, train, validation=held[:1000], log_every=max(1, length["iterations"] // 20), **length, **shared)
    prior = JointEBMPrior(vae)
    prior.fit(train, **fit, **shared)
    prior.calibrate(held.to(device))

    # 2. Its scores, those of the same VAE without energies, and neighbours in pixels.
    gaussian, few = JointEBMPrior(vae), 10 if quick else 1000
    k = layers_redrawn(prior, held[:few].to(device), rng)
    chain: dict[str, Any] = {"num_samples": 1 if quick else 2, "rng": rng}
    scores: dict[str, Callable[[Tensor], Any]] = {
        "": prior.anomaly_score,
        "log_likelihood": lambda x: gaussian.anomaly_score(x, "elbo", num_samples=8, rng=rng),
        "knn": neighbours(train[:10_000]),
    }
    costly: dict[str, Callable[[Tensor], Any]] = {
        "llr": lambda x: prior.llr_score(x, k, **chain),
        "llr_gaussian": lambda x: gaussian.llr_score(x, k, **chain),
        "llr_gaussian_mean": lambda x: gaussian.llr_score(x, k, skipped="mean", **chain),
        "joint_elbo": lambda x: prior.anomaly_score(x, "elbo", rng=rng),
        "importance": lambda x: prior.anomaly_score(x, "log_likelihood", rng=rng),
    }
    scores = {title: score if title == "knn" else on(device, score) for title, score in scores.items()}
    costly = {title: on(device, score) for title, score in costly.items()}
    found: dict[str, dict[str, float]] = {}
    name = name or Path(known).name
    tasks = [DetectionTask.in_and_out(f"{name}/{name}_train", train, test, train, seed=seed)]
    for other, source, quality in unknown:
        strange = load_images(source, "test" if has_test(source) else "train", limit=limit, size=side, channels=channels).images
        strange = strange if quality is None else compressed(strange, quality)
        tasks.insert(-1, DetectionTask.in_and_out(f"{name}/{other}", train, test, strange, seed=seed))
    for task in tasks:
        rows = task.rows(scores)
        rows += DetectionTask.in_and_out(task.name, train, task.known, task.unknown, limit=few, seed=seed).rows(costly)
        found[task.name] = {str(row["metric"]): float(row["value"]) for row in rows} | {"k": k}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        shown = {"tails (default)": scores[""], "log likelihood": scores["log_likelihood"], "neighbours": scores["knn"]}
        draw(out, prior, tasks[0], shown, *tasks[0].name.split("/"), count=10 if quick else 300)
        (out / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def has_test(source: str) -> bool:
    """Whether a folder has a test split; sets on the hub are taken to have one."""
    folder = Path(source)
    return not folder.is_dir() or any(folder.glob("test*"))


def layers_redrawn(prior: JointEBMPrior, held: Tensor, rng: torch.Generator) -> int:
    """k of LLR^{>k}: the largest with at least a tenth of the KL divergence above it."""
    terms = prior.score_terms(held, rng=rng)
    assert terms.log_q is not None  # noqa: S101
    divergence = (terms.log_q - terms.log_prior).mean(0).clamp_min(0)
    above = [float(divergence[k:].sum() / divergence.sum()) for k in range(len(divergence))]
    return max(1, max(k for k, share in enumerate(above) if share >= 0.1))


def compressed(images: Tensor, quality: int) -> Tensor:
    """Images after JPEG compression: that the known set has it and the other has not must not be what is detected."""
    parts = []
    for image in (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1):
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(-1).numpy()).save(buffer, "JPEG", quality=quality)
        pixels = torch.frombuffer(bytearray(Image.open(buffer).tobytes()), dtype=torch.uint8)
        parts.append(pixels.reshape(image.shape))
    return torch.stack(parts).permute(0, 3, 1, 2).float() / 255


if __name__ == "__main__":
    main()
