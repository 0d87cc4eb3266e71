"""What the examples of detection share: the floor that any score has to beat, and their pictures."""

from __future__ import annotations

__all__ = ["draw", "neighbours", "on"]

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from energy_prior import JointEBMPrior, plots
from energy_prior.evaluate import DetectionTask

Score = Callable[[Tensor], Any]


def on(device: str, score: Score) -> Score:
    """A score whose images are moved to where its model is."""
    return lambda x: score(x.to(device))


def neighbours(images: Tensor, k: int = 5) -> Score:
    """Distance to the k-th nearest of some images, in pixels."""
    index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(images.flatten(1).numpy())
    return lambda x: index.kneighbors(x.flatten(1).numpy())[0][:, -1]


def draw(
    out: Path, prior: JointEBMPrior, task: DetectionTask, shown: Mapping[str, Score], known: str, unknown: str, count: int
) -> None:
    """Histograms of L^{>k}, curves of scores, the extremes of both sides, and what the most anomalous images owe it to.

    Args:
        out: folder of the pictures.
        prior: a calibrated prior.
        task: what is known and unknown.
        shown: title -> score, of the curves, which are of all images of the task.
        known: label of the known images.
        unknown: label of the unknown ones.
        count: images of each side in the other pictures.
    """
    labels: dict[str, Any] = {"known": known, "unknown": unknown}
    score = on(str(prior.device), prior.anomaly_score)
    plots.detection_curves(out / "curves.png", {title: task.scores(score) for title, score in shown.items()}, **labels)
    inside, outside = task.known[:count].to(prior.device), task.unknown[:count].to(prior.device)
    rng = torch.Generator().manual_seed(0)
    histograms = {}
    for k in range(min(4, len(prior.energies) + 1)):
        here, there = (-prior.log_joint(x, k, num_samples=4, rng=rng) for x in (inside, outside))
        histograms[f"$-L^{{>{k}}}$"] = here, there
    plots.score_histograms(out / "histograms.png", histograms, **labels)
    panels = {}
    for name, x in ((known, inside), (unknown, outside)):
        order = score(x).argsort()
        panels |= {f"{name}, least anomalous": x[order[:40]], f"{name}, most anomalous": x[order[-40:]]}
    plots.image_panels(out / "extremes.png", panels)
    plots.explanation(out / "explanation.png", outside, prior.explain(outside).surprises())
